// The two large products of a linear layer, with everything that belongs to them. Symbols as in ops.cpp; x, G and P by
// tokens.
#pragma once

#include <ATen/core/Tensor.h>

#include "check.h"

namespace dora_ext {

// y = g * (x W^T + s h B^T) + bias
Tensor forward_product(const Tensor& x, const Tensor& weight, bool transposed, const Tensor& h, const Tensor& lora_B,
                       const Tensor& gain, const OptionalTensor& bias, double scaling);

// dX = G W + P A. Nobody needs G afterwards: it is given up as soon as it can be.
Tensor backward_product(Tensor G, const Tensor& weight, bool transposed, const Tensor& P, const Tensor& lora_A);

// dX = dY [g (W + s B A)], with that matrix rounded once like G, for many tokens: it is smaller than G then, and the
// product has no second part. W (out, in).
bool folded_product_pays(const Tensor& x, const Tensor& weight, int64_t rank);
Tensor folded_backward_product(const Tensor& grad, const Tensor& weight, const Tensor& lora_A, const Tensor& lora_B,
                               const Tensor& gain, double scaling);

}  // namespace dora_ext
