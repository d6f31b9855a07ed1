#include "layer_products.h"

#include <ATen/ScalarOps.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/ones.h>
#include <torch/library.h>

#include <atomic>
#include <string>
#include <string_view>

#include "adapter_backward.h"
#include "aligned.h"
#include "check_product.h"
#include "inside_op.h"
#include "product_choice.h"
#include "products.h"

namespace dora_ext {
namespace {

enum class Products { kAuto, kLibrary, kHopper };

std::atomic<Products> chosen{Products::kAuto};

// Whether the hand-written product for Hopper takes [left | tail] [right | its tail]^T, a tail that we make ourselves,
// as wide and as well aligned as `tail`. It does at one go what costs the library's product one or two more passes over
// a tokens x features array, and by itself is as fast (docs/hopper.md).
bool hopper_takes(const Tensor& left, const Tensor& right, const Tensor& tail, bool right_transposed) {
  static auto fits = find_op<bool(const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&, bool)>(
      "dora_ext::hopper_product_fits");
  const Products which = chosen;
  if (!left.is_cuda() || which == Products::kLibrary || !fits.call(left, right, tail, tail, right_transposed)) {
    return false;
  }
  return which == Products::kHopper ||
         hopper_product_wins(left.size(0), right.size(right_transposed ? 1 : 0), left.size(1));
}

// Whether it also makes the forward's h, on multiprocessors that would be idle in its last round.
bool hopper_makes_hidden(const Tensor& x, const Tensor& weight, const Tensor& lora_A, bool transposed) {
  static auto fits = find_op<bool(const Tensor&, const Tensor&, const Tensor&)>("dora_ext::hopper_forward_fits");
  const Products which = chosen;
  if (transposed || !x.is_cuda() || which == Products::kLibrary || !fits.call(x, weight, lora_A)) return false;
  return which == Products::kHopper || hopper_product_wins(x.size(0), weight.size(0), weight.size(1));
}

// And whether the backward's makes dA, on multiprocessors that are idle in its last round.
bool hopper_makes_grad_A(const Tensor& G, const Tensor& weight, bool transposed, const Tensor& P, const Tensor& x) {
  static auto fits =
      find_op<bool(const Tensor&, const Tensor&, const Tensor&, const Tensor&)>("dora_ext::hopper_backward_fits");
  return !transposed && hopper_takes(G, weight, P, true) && fits.call(G, weight, P, x);
}

Tensor hopper_product(const Tensor& left, const Tensor& right, const Tensor& left_tail, const Tensor& right_tail,
                      const OptionalTensor& gain, const OptionalTensor& bias, bool right_transposed) {
  static auto op = find_op<Tensor(const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&,
                                  const OptionalTensor&, const OptionalTensor&, bool)>("dora_ext::hopper_product");
  return op.call(left, right, left_tail, right_tail, gain, bias, right_transposed);
}

// y = gain * (y + scaling * h B^T) + bias
void compose_op_(Tensor& y, const Tensor& h, const Tensor& lora_B, const Tensor& gain, const OptionalTensor& bias,
                 double scaling) {
  static auto op =
      find_op<void(Tensor&, const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&, double, bool, bool)>(
          "dora_ext::compose_");
  op.call(y, h, lora_B, gain, bias, scaling, /*delta=*/false, /*channels_first=*/false);
}

// s * t in `dtype`, rounded once, in one launch.
Tensor scaled_to(const Tensor& t, double scaling, at::ScalarType dtype) {
  if (scaling == 1) return in_dtype(t, dtype);
  Tensor result = at::empty(t.sizes(), t.options().dtype(dtype));
  return at::mul_out(result, t, at::native::wrapped_scalar_tensor(scaling));
}

// Which of the two the layers run on from now on: "auto", "library" or, wherever it fits, "hopper"; returns what it was
// before. For tests and measurements.
std::string choose_products(std::string_view which) {
  constexpr const char* kNames[] = {"auto", "library", "hopper"};
  for (int i = 0; i < 3; ++i) {
    if (which == kNames[i]) return kNames[static_cast<int>(chosen.exchange(static_cast<Products>(i)))];
  }
  TORCH_CHECK_VALUE(false, "dora_ext::choose_products: which: expected auto, library or hopper, got ",
                    std::string(which));
}

}  // namespace

bool library_products_chosen() {
  return chosen == Products::kLibrary;
}

std::tuple<Tensor, Tensor> forward_products(const Tensor& x, const Tensor& weight, bool transposed,
                                            const Tensor& lora_A, const Tensor& lora_B, const Tensor& gain,
                                            const OptionalTensor& bias, double scaling) {
  const auto dtype = x.scalar_type();
  if (hopper_makes_hidden(x, weight, lora_A, transposed)) {
    static auto op =
        find_op<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                           const OptionalTensor&, double)>("dora_ext::hopper_forward");
    return op.call(x, weight, lora_A, lora_B, gain, bias, scaling);
  }
  const Tensor h = product_with_narrow(x, in_dtype(lora_A, dtype).t());
  if (hopper_takes(x, weight, h, transposed)) {
    const Tensor B = scaled_to(lora_B, scaling, dtype);
    const OptionalTensor b = bias ? OptionalTensor(in_dtype(*bias, at::kFloat)) : std::nullopt;
    const Tensor tail = aligned(transposed ? B.t() : B, 16);
    return {hopper_product(x, weight, h, tail, in_dtype(gain, at::kFloat), b, transposed), h};
  }
  Tensor y;
  OptionalTensor rest = bias;
  if (bias && x.is_cpu()) {
    // With the bias inside the product, as the base layer has it, an adapter that does nothing yet changes y by that
    // product's own rounding at most: g (x W^T + bias) + (1 - g) bias. On CUDA the other order is one launch less.
    y = cpu::multiply(x, transposed ? weight : weight.t(), in_dtype(*bias, dtype));
    rest = bias->sub(gain.mul(*bias));
  } else {
    y = product(x, transposed ? weight : weight.t());
  }
  compose_op_(y, h, lora_B, gain, rest, scaling);
  return {y, h};
}

bool one_forward_with_norms(const Tensor& x, const Tensor& weight, const Tensor& lora_A) {
  static auto fits = find_op<bool(const Tensor&, const Tensor&, const Tensor&)>("dora_ext::hopper_forward_norm_fits");
  const Products which = chosen;
  if (!x.is_cuda() || which == Products::kLibrary || !fits.call(x, weight, lora_A)) return false;
  return which == Products::kHopper || hopper_product_wins(x.size(0), weight.size(0), weight.size(1));
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward_products_with_norms(const Tensor& x, const Tensor& weight,
                                                                       const Tensor& lora_A, const Tensor& lora_B,
                                                                       const Tensor& magnitude,
                                                                       const OptionalTensor& bias, double scaling,
                                                                       const KeptNorms* kept) {
  using Results = std::tuple<Tensor, Tensor, Tensor, Tensor>;
  if (kept == nullptr) {
    static auto op = find_op<Results(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                     const OptionalTensor&, double)>("dora_ext::hopper_forward_norm");
    return op.call(x, weight, lora_A, lora_B, magnitude, bias, scaling);
  }
  static auto op =
      find_op<Results(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&,
                      double, Tensor&, Tensor&, int64_t)>("dora_ext::hopper_forward_norm_cached");
  return op.call(x, weight, lora_A, lora_B, magnitude, bias, scaling, kept->cached, kept->fingerprint, kept->epoch);
}

namespace {

Tensor backward_product(Tensor G, const Tensor& weight, bool transposed, const Tensor& P, const Tensor& A) {
  // To this product W is the other way round.
  if (hopper_takes(G, weight, P, !transposed)) {
    return hopper_product(G, weight, P, aligned(transposed ? A.t() : A, 16), std::nullopt, std::nullopt, !transposed);
  }
  const Tensor W = transposed ? weight.t() : weight;
  // On the CPU the large product adds to what is there at no cost; on CUDA it depends, and mostly costs more. Cheaper
  // still is our own pass over the large one, which half precision would have to round once more.
  if (!has_cpu_loops(G)) return G.is_cpu() ? at::mm(P, A).addmm_(G, W) : at::mm(G, W).addmm_(P, A);
  Tensor grad_x = product(G, W);
  G.reset();
  compose_op_(grad_x, P, A.t(), at::ones({A.size(1)}, A.options().dtype(accumulate_type(A.scalar_type()))),
              std::nullopt, 1);
  return grad_x;
}

}  // namespace

std::tuple<Tensor, Tensor> backward_products(Tensor G, const Tensor& weight, bool transposed, const Tensor& P,
                                             const Tensor& lora_A, const Tensor& x, bool want_A, bool beside) {
  if (want_A && hopper_makes_grad_A(G, weight, transposed, P, x)) {
    static auto op = find_op<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                                        const Tensor&, bool)>("dora_ext::hopper_backward");
    return op.call(G, weight, P, lora_A, x, beside);
  }
  const Tensor grad_x = backward_product(std::move(G), weight, transposed, P, in_dtype(lora_A, x.scalar_type()));
  return {grad_x, want_A ? grad_of_A(lora_A, P, x) : Tensor()};
}

// G takes tokens x out numbers written; g W out x in read, and as many written. Where adapter_backward is not one pass
// (adapter_backward_cuda.cu), its sums need a G anyway.
bool scaled_weight_pays(const Tensor& x, const Tensor& weight, int64_t rank) {
  return x.is_cuda() && is_half(x.scalar_type()) && one_pass_rank(rank) && x.size(0) >= 2 * weight.size(1) &&
         scale_rows_fits(weight);
}

Tensor scaled_weight(const Tensor& weight, const Tensor& gain) {
  static auto op = find_op<Tensor(const Tensor&, const Tensor&)>("dora_ext::scale_rows");
  return op.call(weight, gain);
}

TORCH_LIBRARY_IMPL(dora_ext, CatchAll, m) {
  m.impl("choose_products", choose_products);
}

}  // namespace dora_ext
