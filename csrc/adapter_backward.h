// adapter_backward: everything of a linear layer's backward pass that looks at the output's gradient (tokens, out),
// apart from the one large product. Symbols as in ops.cpp.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

#include "check.h"

namespace dora_ext {

// Bits of `mask`, in the order of the results: G, P = s G B, grad_B, grad_magnitude, grad_bias.
constexpr int64_t kWantG = 1, kWantP = 2, kWantB = 4, kWantMagnitude = 8, kWantBias = 16;

// On CUDA in half precision all but the product with W is one pass over dY for these ranks; elsewhere than on Hopper
// two above 32: the second, of half the memory's traffic, costs what P or dB costs as a product, and fewer launches.
inline bool one_pass_rank(int64_t rank) {
  return rank > 0 && rank <= 64 && rank % 8 == 0;
}

using AdapterGradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// adapter_backward, through the dispatcher.
AdapterGradients adapter_backward_op(const Tensor& grad, const OptionalTensor& y, const Tensor& h, const Tensor& lora_B,
                                     const Tensor& norm, const Tensor& gain, const OptionalTensor& bias, double scaling,
                                     int64_t mask, std::optional<at::ScalarType> magnitude_dtype);

// Whether its last launch makes nothing but what is added up: P and gradients, not G.
bool adapter_backward_in_one_pass(const Tensor& grad, const OptionalTensor& y, const Tensor& h, const Tensor& lora_B);

// compose_backward with the features last, through the dispatcher: G, grad_magnitude, grad_bias.
std::tuple<Tensor, Tensor, Tensor> compose_backward_op(const Tensor& grad, const Tensor& saved, const Tensor& norm,
                                                       const Tensor& gain, const OptionalTensor& bias,
                                                       bool saved_is_output, bool want_G,
                                                       std::optional<at::ScalarType> magnitude_dtype);

// Of library products and compose_backward, on every backend.
AdapterGradients adapter_backward_composed(const Tensor& grad, const OptionalTensor& y, const Tensor& h,
                                           const Tensor& lora_B, const Tensor& norm, const Tensor& gain,
                                           const OptionalTensor& bias, double scaling, int64_t mask,
                                           std::optional<at::ScalarType> magnitude_dtype);

}  // namespace dora_ext
