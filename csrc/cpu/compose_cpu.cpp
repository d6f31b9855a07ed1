// The passes over a layer's output and over its gradient, on the CPU.
#define AT_PER_OPERATOR_HEADERS
#include <ATen/TensorOperators.h>
#include <ATen/Dispatch.h>
#include <ATen/OpMathType.h>
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>

#include "check.h"

namespace dora_ext {
namespace {

constexpr double kSmallGain = 1.0 / 16;  // below it y has lost bits of u
constexpr int64_t kBlock = 64;           // tokens of one partial sum: fixed, so that bits do not depend on threads

// An output-shaped tensor as (outer, features, inner): inner is 1 when the features are the last dimension.
struct Layout {
  int64_t outer = 1, features, inner = 1;
  Layout(const Tensor& t, bool channels_first) {
    const int64_t dim = channels_first ? 1 : t.dim() - 1;
    features = t.size(dim);
    for (int64_t d = 0; d < dim; ++d) outer *= t.size(d);
    for (int64_t d = dim + 1; d < t.dim(); ++d) inner *= t.size(d);
  }
};

Tensor compose(const Tensor& base, const Tensor& h, const Tensor& lora_B, const Tensor& gain,
               const OptionalTensor& bias, double scaling, bool delta, bool channels_first) {
  check_compose(base, h, lora_B, gain, bias, scaling, channels_first);
  const auto acc = accumulate_type(base.scalar_type());
  const Tensor b = base.contiguous(), hc = h.contiguous(), B = lora_B.to(acc).contiguous();
  const Tensor g = gain.to(acc).contiguous(), c = bias ? bias->to(acc).contiguous() : at::zeros_like(g);
  Tensor y = at::empty_like(b);
  const Layout l(b, channels_first);
  const int64_t r = B.size(1);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, b.scalar_type(), "compose", [&] {
    using acc_t = at::opmath_type<scalar_t>;
    const auto *bp = b.const_data_ptr<scalar_t>(), *hp = hc.const_data_ptr<scalar_t>();
    const auto *Bp = B.const_data_ptr<acc_t>(), *gp = g.const_data_ptr<acc_t>(), *cp = c.const_data_ptr<acc_t>();
    auto* yp = y.data_ptr<scalar_t>();
    at::parallel_for(0, l.outer, 1, [&](int64_t begin, int64_t end) {
      for (int64_t o = begin; o < end; ++o)
        for (int64_t f = 0; f < l.features; ++f)
          for (int64_t i = 0; i < l.inner; ++i) {
            acc_t low = 0;
            for (int64_t k = 0; k < r; ++k) low += static_cast<acc_t>(hp[(o * r + k) * l.inner + i]) * Bp[f * r + k];
            low *= static_cast<acc_t>(scaling);
            const int64_t at = (o * l.features + f) * l.inner + i;
            const acc_t v = static_cast<acc_t>(bp[at]);
            yp[at] = static_cast<scalar_t>(delta ? (gp[f] - 1) * (v - cp[f]) + gp[f] * low : gp[f] * (v + low) + cp[f]);
          }
    });
  });
  return y;
}

void compose_(Tensor& base, const Tensor& h, const Tensor& lora_B, const Tensor& gain, const OptionalTensor& bias,
              double scaling, bool delta, bool channels_first) {
  base.copy_(compose(base, h, lora_B, gain, bias, scaling, delta, channels_first));
}

std::tuple<Tensor, Tensor, Tensor> compose_backward(const Tensor& grad, const Tensor& saved, const Tensor& norm,
                                                    const Tensor& gain, const OptionalTensor& bias,
                                                    bool saved_is_output, bool delta, bool channels_first) {
  check_compose_backward(grad, saved, norm, gain, bias, channels_first);
  const auto acc = accumulate_type(grad.scalar_type());
  const Tensor d = grad.contiguous(), v = saved.contiguous(), n = norm.to(acc), g = gain.to(acc);
  const Tensor c = bias ? bias->to(acc).contiguous() : at::zeros_like(g);
  const Layout l(d, channels_first);
  // Features last: blocks of tokens. Channels first: one block per sample.
  const int64_t per = channels_first ? 1 : kBlock, blocks = (l.outer + per - 1) / per;
  Tensor G = at::empty_like(d), sums = at::zeros({blocks, 2, l.features}, n.options());
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, d.scalar_type(), "compose_backward", [&] {
    using acc_t = at::opmath_type<scalar_t>;
    const auto *dp = d.const_data_ptr<scalar_t>(), *vp = v.const_data_ptr<scalar_t>();
    const auto *gp = g.const_data_ptr<acc_t>(), *cp = c.const_data_ptr<acc_t>();
    auto *Gp = G.data_ptr<scalar_t>();
    auto *sp = sums.data_ptr<acc_t>();
    at::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t o = begin * per; o < std::min(end * per, l.outer); ++o)
        for (int64_t f = 0; f < l.features; ++f)
          for (int64_t i = 0; i < l.inner; ++i) {
            const int64_t at = (o * l.features + f) * l.inner + i;
            const acc_t dv = static_cast<acc_t>(dp[at]);
            Gp[at] = static_cast<scalar_t>((delta ? gp[f] - 1 : gp[f]) * dv);
            acc_t* s = sp + (o / per) * 2 * l.features + f;
            s[0] += dv * (static_cast<acc_t>(vp[at]) - cp[f]);
            s[l.features] += dv;
          }
    });
  });
  const Tensor total = sums.sum(0);
  Tensor dm = total[0] / n, drop = n == 0;
  if (saved_is_output) {
    dm.div_(g);
    drop = drop.logical_or(g.abs() < kSmallGain);
  }
  return {G, dm.masked_fill_(drop, 0), total[1].clone()};
}

void magnitude_grad_recover_(Tensor& grad_magnitude, const Tensor& grad_y, const Tensor& x, const Tensor& h,
                             const Tensor& weight, const Tensor& lora_B, const Tensor& norm, const Tensor& gain,
                             double scaling, bool transposed) {
  const Tensor columns = (gain.abs() < kSmallGain).logical_and_(norm > 0).nonzero().flatten();
  const auto acc = norm.scalar_type();
  // In pieces, because dY^T x is as large as the weight when every gain is small.
  for (int64_t begin = 0; begin < columns.size(0); begin += kBlock) {
    const Tensor piece = columns.slice(0, begin, std::min(begin + kBlock, columns.size(0)));
    const Tensor dT = grad_y.index_select(1, piece).to(acc).t();
    const Tensor W = transposed ? weight.index_select(1, piece).t() : weight.index_select(0, piece);
    const Tensor B = lora_B.index_select(0, piece).to(acc);
    const Tensor base = (at::mm(dT, x.to(acc)) * W.to(acc)).sum(1), low = (at::mm(dT, h.to(acc)) * B).sum(1);
    grad_magnitude.index_copy_(0, piece, (base + scaling * low) / norm.index_select(0, piece));
  }
}

}  // namespace

TORCH_LIBRARY_IMPL(dora_ext, CPU, m) {
  m.impl("compose", compose);
  m.impl("compose_", compose_);
  m.impl("compose_backward", compose_backward);
  m.impl("magnitude_grad_recover_", magnitude_grad_recover_);
}

}  // namespace dora_ext
