// The passes over a layer's output and over its gradient, on the CPU.
#include <ATen/ops/empty_like.h>
#include <ATen/ops/index_select.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <cmath>
#include <tuple>
#include <vector>

#include "faces.h"

namespace dora_ext::cpu {
namespace {

constexpr double kSmallGain = 1.0 / 16;  // below it the output has lost bits of u

// An output-shaped tensor as (outer, features, inner); inner is 1 when the features are the last dimension.
struct Layout {
  int64_t outer = 1, features, inner = 1;

  Layout(const Tensor& t, bool channels_first) {
    const int64_t dim = channels_first ? 1 : t.dim() - 1;
    features = t.size(dim);
    for (int64_t d = 0; d < dim; ++d) outer *= t.size(d);
    for (int64_t d = dim + 1; d < t.dim(); ++d) inner *= t.size(d);
  }
};

// (batch, features, ...) whose memory has the features last (torch.channels_last): no copy, another view serves.
bool stored_features_last(const Tensor& t, bool channels_first) {
  return channels_first && t.dim() > 2 && !t.is_contiguous() && t.movedim(1, -1).is_contiguous();
}

}  // namespace

void compose_into(const Tensor& y, const Tensor& base, const Tensor& h, const Tensor& lora_B, const Tensor& gain,
                  const OptionalTensor& bias, double scaling, bool delta, bool channels_first) {
  const auto acc = accumulate_type(base.scalar_type());
  const Layout l(base, channels_first);
  const Tensor H = contiguous_as(h, acc), B = lora_B.to(acc), g = contiguous_as(gain, acc);
  Tensor mul = g, add = bias ? contiguous_as(*bias, acc) : at::zeros_like(g);
  if (delta) {
    mul = g.sub(1);
    add = mul.mul(add).neg_();
  }
  const int64_t r = B.size(1);
  dispatch(base.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using Acc = acc_type<T>;
    const auto& loops = kernels<T>();
    T* to = data<T>(y);
    const T* from = data<T>(base);
    const Acc *hp = data<Acc>(H), *mp = data<Acc>(mul), *ap = data<Acc>(add);
    if (l.inner == 1) {
      const Tensor panels = pack<T>(B.t(), scaling, &g);
      const LowRank<Acc> all{hp, r, 1, r, data<Acc>(panels)};
      at::parallel_for(0, l.outer, grain(l.features), [&](int64_t begin, int64_t end) {
        LowRank<Acc> low = all;
        low.coefficients += begin * r;
        const int64_t at = begin * l.features;
        loops.compose_by_column(to + at, from + at, end - begin, l.features, low, mp, ap);
      });
      return;
    }
    const Tensor C = B.mul(g.unsqueeze(1)).contiguous();
    const int64_t count = divide_up(l.inner, loops.panel), size = l.features * l.inner;
    at::parallel_for(0, l.outer, grain(size), [&](int64_t begin, int64_t end) {
      std::vector<Acc> panels(count * r * loops.panel);
      for (int64_t o = begin; o < end; ++o) {
        for (int64_t p = 0; p < count; ++p) {
          const int64_t first = p * loops.panel;
          loops.pack(panels.data() + first * r, loops.panel, hp + o * r * l.inner + first, l.inner, 1, r,
                     l.inner - first, static_cast<Acc>(scaling), nullptr);
        }
        const LowRank<Acc> low{data<Acc>(C), r, 1, r, panels.data()};
        loops.compose_by_row(to + o * size, from + o * size, l.features, l.inner, low, mp, ap);
      }
    });
  });
}

namespace {

Tensor compose(const Tensor& base, const Tensor& h, const Tensor& lora_B, const Tensor& gain,
               const OptionalTensor& bias, double scaling, bool delta, bool channels_first) {
  check_compose(base, h, lora_B, gain, bias, scaling, channels_first);
  if (stored_features_last(base, channels_first)) {
    return compose(base.movedim(1, -1), h.movedim(1, -1), lora_B, gain, bias, scaling, delta, false).movedim(-1, 1);
  }
  const Tensor from = base.contiguous(), y = at::empty_like(from);
  compose_into(y, from, h, lora_B, gain, bias, scaling, delta, channels_first);
  return y;
}

void compose_(Tensor& base, const Tensor& h, const Tensor& lora_B, const Tensor& gain, const OptionalTensor& bias,
              double scaling, bool delta, bool channels_first) {
  check_compose(base, h, lora_B, gain, bias, scaling, channels_first);
  if (stored_features_last(base, channels_first)) {
    const Tensor moved = base.movedim(1, -1);
    return compose_into(moved, moved, h.movedim(1, -1), lora_B, gain, bias, scaling, delta, false);
  }
  const Tensor y = base.contiguous();
  compose_into(y, y, h, lora_B, gain, bias, scaling, delta, channels_first);
  if (!y.is_same(base)) base.copy_(y);
}

std::tuple<Tensor, Tensor, Tensor> compose_backward(const Tensor& grad, const Tensor& saved, const Tensor& norm,
                                                    const Tensor& gain, const OptionalTensor& bias,
                                                    bool saved_is_output, bool delta, bool channels_first, bool want_G,
                                                    std::optional<at::ScalarType> magnitude_dtype) {
  check_compose_backward(grad, saved, norm, gain, bias, channels_first);
  if (stored_features_last(grad, channels_first)) {
    auto [G, dm, db] = compose_backward(grad.movedim(1, -1), saved.movedim(1, -1), norm, gain, bias, saved_is_output,
                                        delta, false, want_G, magnitude_dtype);
    return {want_G ? G.movedim(-1, 1) : G, dm, db};
  }
  // Fixed blocks of rows, so that bits do not depend on threads; no more than kMostBlocks partial sums.
  constexpr int64_t kFewestRows = 32, kMostBlocks = 128;
  const auto acc = accumulate_type(grad.scalar_type());
  const Layout l(grad, channels_first);
  const Tensor d = grad.contiguous(), v = saved.contiguous();
  const Tensor G = want_G ? at::empty_like(d) : at::empty({0}, d.options());
  const Tensor n = contiguous_as(norm, acc), g = contiguous_as(gain, acc), mul = delta ? g.sub(1) : g;
  const Tensor sub = bias ? contiguous_as(*bias, acc) : at::zeros_like(g);
  const int64_t rows = l.inner > 1 ? 1 : std::max(kFewestRows, divide_up(l.outer, kMostBlocks));
  const int64_t blocks = divide_up(l.outer, rows), size = l.features * l.inner;
  const Tensor sums = at::zeros({blocks, 2, l.features}, n.options());
  const Tensor dm = at::empty_like(n), db = at::empty_like(n);
  dispatch(d.scalar_type(), [&](auto element) {
    using T = decltype(element);
    using Acc = acc_type<T>;
    T* Gp = want_G ? data<T>(G) : nullptr;
    const T *dp = data<T>(d), *vp = data<T>(v);
    const Acc *mp = data<Acc>(mul), *cp = data<Acc>(sub), *np = data<Acc>(n), *gp = data<Acc>(g);
    at::parallel_for(0, blocks, grain(rows * size), [&](int64_t begin, int64_t end) {
      for (int64_t b = begin; b < end; ++b) {
        const int64_t at = b * rows * size, count = std::min(rows, l.outer - b * rows);
        Acc* to = data<Acc>(sums) + b * 2 * l.features;
        T* G_at = want_G ? Gp + at : nullptr;
        l.inner > 1 ? kernels<T>().backward_by_row(G_at, dp + at, vp + at, l.features, l.inner, mp, cp, to)
                    : kernels<T>().backward_by_column(G_at, dp + at, vp + at, count, l.features, mp, cp, to);
      }
    });
    Acc *mg = data<Acc>(dm), *bg = data<Acc>(db);
    for_column_sums(data<Acc>(sums), blocks, 2 * l.features, [&](int64_t j, double sum) {
      if (j >= l.features) {
        bg[j - l.features] = static_cast<Acc>(sum);
        return;
      }
      const double divisor = saved_is_output ? static_cast<double>(np[j]) * gp[j] : np[j];
      const bool drop = !(np[j] > 0) || (saved_is_output && std::abs(gp[j]) < kSmallGain);
      mg[j] = drop ? 0 : static_cast<Acc>(sum / divisor);
    });
  });
  return {G, magnitude_dtype ? dm.to(*magnitude_dtype) : dm, db};
}

// Output features whose gain is too small, without being there for nothing (n > 0).
std::vector<int64_t> small_gains(const Tensor& norm, const Tensor& gain) {
  std::vector<int64_t> columns;
  dispatch(norm.scalar_type(), [&](auto element) {
    using Acc = acc_type<decltype(element)>;
    const Tensor n = norm.contiguous(), g = contiguous_as(gain, norm.scalar_type());
    const Acc *np = data<Acc>(n), *gp = data<Acc>(g);
    for (int64_t j = 0; j < n.numel(); ++j)
      if (np[j] > 0 && std::abs(gp[j]) < kSmallGain) columns.push_back(j);
  });
  return columns;
}

void magnitude_grad_recover_(Tensor& grad_magnitude, const Tensor& grad_y, const Tensor& x, const Tensor& h,
                             const Tensor& weight, const Tensor& lora_B, const Tensor& norm, const Tensor& gain,
                             double scaling, bool transposed, bool /*beside*/) {
  constexpr int64_t kPiece = 64;  // dY^T x is as large as the weight when every gain is small: not all at once
  auto columns = small_gains(norm, gain);
  if (columns.empty()) return;
  const auto acc = norm.scalar_type();
  const Tensor X = x.to(acc), H = h.to(acc), W = transposed ? weight.t() : weight;
  const auto count = static_cast<int64_t>(columns.size());
  for (int64_t begin = 0; begin < count; begin += kPiece) {
    const Tensor piece = at::empty({std::min(kPiece, count - begin)}, x.options().dtype(at::kLong));
    std::copy_n(columns.begin() + begin, piece.size(0), data<int64_t>(piece));
    const Tensor dT = at::index_select(grad_y, 1, piece).to(acc).t();
    const Tensor w = at::index_select(W, 0, piece).to(acc), b = at::index_select(lora_B, 0, piece).to(acc);
    const Tensor sum = at::mm(dT, X).mul_(w).sum(1).add_(at::mm(dT, H).mul_(b).sum(1), scaling);
    grad_magnitude.index_copy_(0, piece, sum.div_(at::index_select(norm, 0, piece)).to(grad_magnitude.scalar_type()));
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(dora_ext, CPU, m) {
  m.impl("compose", compose);
  m.impl("compose_", compose_);
  m.impl("compose_backward", compose_backward);
  m.impl("magnitude_grad_recover_", magnitude_grad_recover_);
}

}  // namespace dora_ext::cpu
