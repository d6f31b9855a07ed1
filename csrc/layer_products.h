// The two large products of a linear layer, with everything that belongs to them. Symbols as in ops.cpp; x, G and P by
// tokens.
#pragma once

#include <ATen/core/Tensor.h>

#include <tuple>

#include "check.h"
#include "kept_norms.h"

namespace dora_ext {

// Whether choose_products has the layers do without kernels that only Hopper has.
bool library_products_chosen();

// y = g * (x W^T + s h B^T) + bias, and h = x A^T
std::tuple<Tensor, Tensor> forward_products(const Tensor& x, const Tensor& weight, bool transposed,
                                            const Tensor& lora_A, const Tensor& lora_B, const Tensor& gain,
                                            const OptionalTensor& bias, double scaling);

// y, h, n and g of a W (out, in), where one op launches norms and product, or a product that makes both; `kept` may be
// null.
bool one_forward_with_norms(const Tensor& x, const Tensor& weight, const Tensor& lora_A);
std::tuple<Tensor, Tensor, Tensor, Tensor> forward_products_with_norms(const Tensor& x, const Tensor& weight,
                                                                       const Tensor& lora_A, const Tensor& lora_B,
                                                                       const Tensor& magnitude,
                                                                       const OptionalTensor& bias, double scaling,
                                                                       const KeptNorms* kept);

// dX = G W + P A. Nobody needs G afterwards: it is given up as soon as it can be. And dA = P^T x in lora_A's dtype, if
// `want_A`; else undefined. beside: the launch before made none of G, W and x.
std::tuple<Tensor, Tensor> backward_products(Tensor G, const Tensor& weight, bool transposed, const Tensor& P,
                                             const Tensor& lora_A, const Tensor& x, bool want_A, bool beside);

// dX = [dY | P] [g W ; A] in place of [G | P] [W ; A], on CUDA, where g W takes less memory to make than G. W (out,
// in).
bool scaled_weight_pays(const Tensor& x, const Tensor& weight, int64_t rank);
Tensor scaled_weight(const Tensor& weight, const Tensor& gain);

}  // namespace dora_ext
