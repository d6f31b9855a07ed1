// What the layers' nodes in autograd's graph have in common (linear_autograd.cpp, linear_nf4_autograd.cpp,
// conv_autograd.cpp, embedding_autograd.cpp). They are in C++, so that a step of training runs no Python between a
// layer's call and its gradients: that takes the host longer than their launches.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/csrc/autograd/custom_function.h>

#include <initializer_list>
#include <string>
#include <utility>

#include "check.h"

namespace dora_ext {

using torch::autograd::AutogradContext;
using torch::autograd::Function;
using torch::autograd::variable_list;

inline OptionalTensor if_defined(const Tensor& t) {
  return t.defined() ? OptionalTensor(t) : std::nullopt;
}

// Whether a call with these inputs gets a node. Undefined tensors are inputs that were not given.
inline bool is_recorded(const char* op, std::initializer_list<Tensor> inputs) {
  bool requires_grad = false;
  for (const Tensor& t : inputs) {
    if (!t.defined()) continue;
    TORCH_CHECK_NOT_IMPLEMENTED(!t._fw_grad(/*level=*/0).defined(), op, " has no forward-mode derivative");
    requires_grad |= t.requires_grad();
  }
  return requires_grad && at::GradMode::is_enabled();
}

// Which of a node's inputs ask for their gradients, the first in bit 0. given: which there are; only they have edges.
inline int64_t asked_gradients(const AutogradContext* context, std::initializer_list<bool> given) {
  int64_t mask = 0, bit = 1;
  size_t edge = 0;
  for (const bool is_given : given) {
    if (is_given && context->needs_input_grad(edge++)) mask |= bit;
    bit <<= 1;
  }
  return mask;
}

// In m's place: a backward op asks it for its shape and its dtype, and this way it need not be saved.
inline Tensor like_magnitude(const Tensor& gain, int64_t dtype) {
  const auto as = static_cast<at::ScalarType>(dtype);
  return gain.scalar_type() == as ? gain : at::empty_like(gain, gain.options().dtype(as));
}

// -1: of inference mode, whose tensors have none.
inline int64_t version_of(const Tensor& t) {
  return t.is_inference() ? -1 : static_cast<int64_t>(t._version());
}

// Constants are small, and nobody trains them: a hook on saved tensors (activation checkpointing) costs more than they
// do, so the node itself holds them, each by itself (compiled autograd does not look into lists). Undefined ones are
// not held.
inline void keep_constants(AutogradContext* context, const variable_list& constants) {
  auto& kept = context->saved_data;
  int i = 0;
  for (const Tensor& t : constants) {
    if (t.defined()) {
      kept["constant" + std::to_string(i)] = t;
      kept["version" + std::to_string(i)] = version_of(t);
    }
    ++i;
  }
}

inline Tensor kept_constant(AutogradContext* context, size_t i) {
  const auto& kept = context->saved_data;
  const auto found = kept.find("constant" + std::to_string(i));
  if (found == kept.end()) return {};
  Tensor t = found->second.toTensor();
  TORCH_CHECK(version_of(t) == kept.at("version" + std::to_string(i)).toInt(),
              "dora_ext: a norm, gain, scale or parameter needed for backward was modified by an inplace operation");
  return t;
}

// What backward reads: activations, constants, and W, A, B and the bias. A module's own parameters stay where they are,
// whatever becomes of the graph: no hook need see them, and where the caller says that these are such, they are `held`
// as constants are.
struct NodeKeeps {
  variable_list activations, constants, parameters;

  void save(AutogradContext* context, bool held) && {
    variable_list& beside = held ? constants : activations;
    beside.insert(beside.end(), parameters.begin(), parameters.end());
    context->saved_data["held"] = held;
    context->save_for_backward(std::move(activations));
    keep_constants(context, constants);
  }

  // With as many of each as were saved.
  static NodeKeeps of(AutogradContext* context, size_t activations, size_t constants, size_t parameters) {
    NodeKeeps found{context->get_saved_variables(), {}, {}};
    const bool held = context->saved_data["held"].toBool();
    for (size_t i = 0; i < constants; ++i) found.constants.push_back(kept_constant(context, i));
    for (size_t i = 0; i < parameters; ++i) {
      found.parameters.push_back(held ? kept_constant(context, constants + i) : found.activations[activations + i]);
    }
    return found;
  }
};

// An output, for save_for_backward. Whoever overwrites it in place (ReLU(inplace=True)) makes it useless for backward,
// which is no error: so it is saved without its version, and something empty has that instead.
inline Tensor saved_output(AutogradContext* context, const Tensor& y) {
  const Tensor counter = at::empty({0}, y.options());
  torch::autograd::impl::set_version_counter(counter, torch::autograd::impl::version_counter(y));
  context->saved_data["output_counter"] = counter;
  context->saved_data["output_version"] = version_of(counter);
  return y.variable_data();
}

// That output, or nothing if it has been overwritten since.
inline OptionalTensor unchanged_output(AutogradContext* context, const Tensor& saved) {
  auto& kept = context->saved_data;
  if (!saved.defined() || version_of(kept["output_counter"].toTensor()) != kept["output_version"].toInt()) {
    return std::nullopt;
  }
  return saved;
}

// The gradients are constants of a second backward, which must not go on silently.
struct OnceDifferentiable : Function<OnceDifferentiable> {
  static Tensor forward(AutogradContext*, const Tensor& gradient, const Tensor&) { return gradient.detach(); }
  static variable_list backward(AutogradContext*, const variable_list&) {
    TORCH_CHECK(false, "dora_ext: trying to differentiate twice a DoRA layer, which is once differentiable");
  }
};

// Gradients as a node returns them: those that nobody asked for undefined.
inline void finish_gradients(variable_list& gradients, int64_t mask, const Tensor& grad_y) {
  const bool again = at::GradMode::is_enabled() && grad_y.requires_grad();
  for (size_t i = 0; i < gradients.size(); ++i) {
    if (!(mask >> i & 1)) {
      gradients[i] = Tensor();
    } else if (again) {
      gradients[i] = OnceDifferentiable::apply(gradients[i], grad_y);
    }
  }
}

}  // namespace dora_ext
