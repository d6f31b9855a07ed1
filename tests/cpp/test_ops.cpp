// Calls the ops from C++ through torch's dispatcher, as a program without Python would, and checks the numbers
// against plain ATen. Run by ctest; prints what failed and returns how many checks did.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/rand.h>
#include <ATen/ops/randn.h>

#include <cstdio>
#include <optional>
#include <string>
#include <tuple>

namespace {

using at::Tensor;
int failures = 0;

template <class Signature>
auto op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

void check_close(const char* what, const Tensor& out, const Tensor& ref, double tolerance) {
  const bool same_shape = out.sizes() == ref.sizes();
  const double error = same_shape ? ((out.to(at::kDouble) - ref).norm() / ref.norm()).item<double>() : 1.0;
  const bool good = same_shape && error <= tolerance;  // false for NaN too
  std::printf("%s %s: relative error %.2g\n", good ? "ok  " : "FAIL", what, error);
  failures += good ? 0 : 1;
}

void check_norm_and_linear(at::ScalarType dtype, double tolerance) {
  const auto options = at::TensorOptions().dtype(dtype);
  const int64_t tokens = 5, in = 48, out = 33, r = 6;
  const double scaling = 1.5;
  const Tensor x = at::randn({tokens, in}, options), weight = at::randn({out, in}, options);
  const Tensor lora_A = at::randn({r, in}, options), lora_B = at::randn({out, r}, options);
  const Tensor magnitude = at::rand({out}, options) + 0.5, bias = at::randn({out}, options);

  const Tensor adapted = weight.to(at::kDouble) + scaling * at::mm(lora_B.to(at::kDouble), lora_A.to(at::kDouble));
  const Tensor expected_norm = adapted.norm(2, {1});
  const Tensor expected_gain = magnitude / expected_norm;
  const Tensor expected_y = at::mm(x.to(at::kDouble), adapted.t()) * expected_gain + bias;

  const auto [norm, gain] =
      op<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&, double, bool)>(
          "dora_ext::norm")
          .call(weight, lora_A, lora_B, magnitude, scaling, false);
  check_close("norm", norm, expected_norm, tolerance);
  check_close("gain", gain, expected_gain, tolerance);

  using Optional = const std::optional<Tensor>&;
  const auto linear =
      op<std::tuple<Tensor, Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                                    const Tensor&, Optional, Optional, Optional, double, bool)>(
          "dora_ext::linear_forward");
  const auto result =
      linear.call(x, weight, lora_A, lora_B, magnitude, bias, std::nullopt, std::nullopt, scaling, false);
  check_close("linear_forward", std::get<0>(result), expected_y, tolerance);
}

void check_nf4() {
  const Tensor x = at::randn({7, 64});
  const auto [packed, absmax] =
      op<std::tuple<Tensor, Tensor>(const Tensor&, int64_t)>("dora_ext::quantize_nf4").call(x, 64);
  using Optional = const std::optional<Tensor>&;
  const Tensor back = op<Tensor(const Tensor&, const Tensor&, int64_t, c10::SymIntArrayRef, at::ScalarType, Optional,
                                Optional, Optional, int64_t, Optional)>("dora_ext::dequantize_nf4")
                          .call(packed, absmax, 64, c10::fromIntArrayRefSlow(x.sizes()), at::kFloat, std::nullopt,
                                std::nullopt, std::nullopt, 256, std::nullopt);
  check_close("nf4 absmax", absmax, x.abs().amax(1).to(at::kDouble), 0.0);
  // Half the widest gap of the codebook, 0.1520, bounds each weight; over normal weights about 0.095 is usual.
  check_close("nf4 there and back", back, x.to(at::kDouble), 0.12);
}

bool refuses_bad_shapes() {
  try {
    op<std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&, double, bool)>(
        "dora_ext::norm")
        .call(at::randn({4, 8}), at::randn({2, 7}), at::randn({4, 2}), at::randn({4}), 1.0, false);
  } catch (const c10::Error& error) {
    return std::string(error.what()).find("lora_A: expected shape (r, 8)") != std::string::npos;
  }
  return false;
}

}  // namespace

int main() {
  at::Generator generator = at::detail::getDefaultCPUGenerator();  // a handle: the seed is set for everyone
  generator.set_current_seed(0);
  check_norm_and_linear(at::kDouble, 1e-12);
  check_norm_and_linear(at::kFloat, 1e-5);
  check_nf4();
  const bool refused = refuses_bad_shapes();
  std::printf("%s a misfit is refused by name\n", refused ? "ok  " : "FAIL");
  failures += refused ? 0 : 1;
  std::printf("%s\n", failures ? "failed" : "all passed");
  return failures;
}
