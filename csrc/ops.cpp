// Every op of dora_ext on one page. A backend registers its kernels at the foot of its own files;
// ops composed of library products and of other ops (linear.cpp) are registered once for all backends.
//
// Symbols, as in the README:  x (..., in)   weight W (out, in), or (in, out) when `transposed`
//   lora_A (r, in)   lora_B (out, r)   scaling s   magnitude m (out,)   norm n (out,) = |W + s B A| by row
//   gain g = m / n (out,), 0 where n = 0   h = x A^T   u = x W^T + s h B^T   y = g * u + bias
// norm and gain are fp32, or fp64 when weight is fp64. A gradient nobody asked for is an empty tensor.
#include <torch/library.h>

TORCH_LIBRARY(dora_ext, m) {
  // n and g. W in any of the four float dtypes; A and B are cast to W's dtype, products and sums run in fp32
  // (fp64 for fp64). `transposed`: W is (in, out), as in GPT-2's Conv1D and in embeddings. Of a convolution in one
  // group, W (out, in, *kernel), A (r, in, *kernel), B (out, r, 1, ...) and a magnitude in any shape.
  m.def(
      "norm(Tensor weight, Tensor lora_A, Tensor lora_B, Tensor magnitude, float scaling, bool transposed=False)"
      " -> (Tensor norm, Tensor gain)");
  // The same through a cache that checks itself on the device, without synchronising: `fingerprint` (int64[4]:
  // stored hash, running hash, ticket, number of norms computed) covers all bits of A and B and a sample of every
  // row and column of W; only when it differs are the norms in `cached` (out,) computed again. Norms of another `epoch`
  // do not count: the caller knows that something changed. Returns fresh copies.
  m.def(
      "norm_cached(Tensor weight, Tensor lora_A, Tensor lora_B, Tensor magnitude, float scaling, bool transposed,"
      " Tensor(a!) cached, Tensor(b!) fingerprint, int epoch=0) -> (Tensor norm, Tensor gain)");

  // Linear, whole, and differentiable: linear_forward_cached where `cached` and `fingerprint` are given, else
  // linear_forward. No gradient flows to weight, norm and gain. held: weight, lora_A, lora_B and bias are parameters of
  // a module, which no hook on saved tensors need see.
  m.def(
      "linear(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor magnitude, Tensor? bias, Tensor? norm,"
      " Tensor? gain, float scaling, bool transposed=False, Tensor(a!)? cached=None, Tensor(b!)? fingerprint=None,"
      " int epoch=0, bool held=False) -> Tensor");
  // Its parts. `norm` and `gain` are computed here where they come as None, and come back empty otherwise. lora_A,
  // lora_B, magnitude and bias may be wider than x; weight has x's dtype. h has x's dtype, shape (tokens, r).
  m.def(
      "linear_forward(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor magnitude, Tensor? bias,"
      " Tensor? norm, Tensor? gain, float scaling, bool transposed=False)"
      " -> (Tensor y, Tensor h, Tensor norm, Tensor gain)");
  // The same with the norms through a cache, as norm_cached has it.
  m.def(
      "linear_forward_cached(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor magnitude, Tensor? bias,"
      " float scaling, bool transposed, Tensor(a!) cached, Tensor(b!) fingerprint, int epoch=0)"
      " -> (Tensor y, Tensor h, Tensor norm, Tensor gain)");
  // mask: bit 0 x, 1 lora_A, 2 lora_B, 3 magnitude, 4 bias. y, the saved output, serves to find u again; without
  // it (None: not saved, or overwritten since) u is computed once more, if the magnitude's gradient is asked for.
  m.def(
      "linear_backward(Tensor grad_y, Tensor? y, Tensor x, Tensor h, Tensor weight, Tensor lora_A, Tensor lora_B,"
      " Tensor magnitude, Tensor? bias, Tensor norm, Tensor gain, float scaling, bool transposed, int mask)"
      " -> (Tensor grad_x, Tensor grad_A, Tensor grad_B, Tensor grad_magnitude, Tensor grad_bias)");

  // What linear_backward sees of the gradient grad (tokens, out): G = g * grad, P = s G B (tokens, r), and the
  // gradients of B, m and the bias. mask: bit 0 G, 1 P, 2 lora_B, 3 magnitude, 4 bias. y (tokens, out) and h (tokens,
  // r) in grad's dtype; y may be None where m's gradient isn't asked for. grad_B has lora_B's dtype, grad_magnitude and
  // grad_bias norm's, or grad_magnitude magnitude_dtype; of features with |g| < 1/16 it leaves the magnitude to
  // magnitude_grad_recover_.
  m.def(
      "adapter_backward(Tensor grad, Tensor? y, Tensor h, Tensor lora_B, Tensor norm, Tensor gain, Tensor? bias,"
      " float scaling, int mask, ScalarType? magnitude_dtype=None)"
      " -> (Tensor G, Tensor P, Tensor grad_B, Tensor grad_magnitude, Tensor grad_bias)");
  // Is that one pass over grad and y, with a launch behind it that adds up all but G? CUDA only.
  m.def("adapter_backward_in_one_pass(Tensor grad, Tensor? y, Tensor h, Tensor lora_B) -> bool");

  // What is made by output feature of E (out, r) = dY^T h: grad_B = s g E in lora_B's dtype and shape, (out, r) or a
  // convolution's (out, r, 1, ...); grad_magnitude, given without the adapter's part, with s sum_k(E B) / n, 0 where
  // n = 0; scaled_B (out, r) = s g B, with which P = dY scaled_B. In the dtypes given; with want_B false and without a
  // dtype not made, and empty. E may be None for scaled_B alone. Sums run in fp32, in fp64 where norm is.
  m.def(
      "feature_gradients(Tensor? E, Tensor lora_B, Tensor norm, Tensor gain, Tensor? grad_magnitude, float scaling,"
      " bool want_B, ScalarType? magnitude_dtype, ScalarType? scaled_dtype)"
      " -> (Tensor grad_B, Tensor grad_magnitude, Tensor scaled_B)");

  // The same for 1 to 8 tokens in fp16 or bf16, with g known, in one pass over W; CUDA only, and only what decode_fits
  // and decode_nf4_fits (check_decode.h) accept. x (tokens, in), y (tokens, out), h (tokens, r) rounded to x's dtype.
  // A, B, g and bias are read as they are; sums run in fp32. W packed in NF4 is not rounded to `dtype`, its own (fp32
  // or x's): it is the scales, exactly, times a codebook that is 0.8e-3 off in bf16 and 0.8e-4 in fp16
  // (decode_nf4.cuh).
  m.def(
      "linear_decode(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor gain, Tensor? bias, float scaling)"
      " -> (Tensor y, Tensor h)");
  m.def(
      "linear_decode_nf4(Tensor x, Tensor packed, Tensor absmax, int blocksize, SymInt[] shape, ScalarType dtype,"
      " Tensor? nested_absmax, Tensor? nested_code, Tensor? offset, int nested_blocksize, Tensor lora_A, Tensor lora_B,"
      " Tensor gain, Tensor? bias, float scaling) -> (Tensor y, Tensor h)");

  // The pass over the output. Features are the last dimension, or dimension 1 when `channels_first`; h holds r in
  // the same place. base = x W^T (no bias):      y = g * (base + s h B^T) + bias
  // delta (base already holds the bias; what a DoRA adds to a base layer's result):
  //                                             y = (g - 1) * (base - bias) + g * s h B^T
  m.def(
      "compose(Tensor base, Tensor h, Tensor lora_B, Tensor gain, Tensor? bias, float scaling, bool delta=False,"
      " bool channels_first=False) -> Tensor");
  m.def(
      "compose_(Tensor(a!) base, Tensor h, Tensor lora_B, Tensor gain, Tensor? bias, float scaling,"
      " bool delta=False, bool channels_first=False) -> ()");
  // The pass over the output's gradient, with a = g (g - 1 when delta):   G = a * grad,   grad_bias = sum grad
  //   saved_is_output: saved = y, so u = (y - bias) / g:  grad_magnitude = sum grad * u / n  where |g| >= 1/16; below
  //                    that y has lost bits of u, the entry is left 0 and magnitude_grad_recover_ fills it in
  //   otherwise        saved = base (bias is taken off it):  grad_magnitude = sum grad * (saved - bias) / n, the part
  //                    without the adapter's s h B^T
  // n = 0 gives 0. grad_magnitude and grad_bias are norm's dtype, or grad_magnitude magnitude_dtype. Without want_G, G
  // is empty. Sums over tokens are two-stage: same bits each time.
  m.def(
      "compose_backward(Tensor grad, Tensor saved, Tensor norm, Tensor gain, Tensor? bias, bool saved_is_output,"
      " bool delta=False, bool channels_first=False, bool want_G=True, ScalarType? magnitude_dtype=None)"
      " -> (Tensor G, Tensor grad_magnitude, Tensor grad_bias)");
  // Fills grad_magnitude (out,) where n > 0 and |g| < 1/16 from the products themselves. grad_y (tokens, out), x
  // (tokens, in). beside: the launch before this one made neither norm nor gain, so that this one need not wait for it.
  m.def(
      "magnitude_grad_recover_(Tensor(a!) grad_magnitude, Tensor grad_y, Tensor x, Tensor h, Tensor weight,"
      " Tensor lora_B, Tensor norm, Tensor gain, float scaling, bool transposed=False, bool beside=False) -> ()");
  // The same over a W (out, in) packed in NF4, in x's dtype, of which only the rows in question are unpacked. CUDA
  // only.
  m.def(
      "magnitude_grad_recover_nf4_(Tensor(a!) grad_magnitude, Tensor grad_y, Tensor x, Tensor h, Tensor packed,"
      " Tensor absmax, int blocksize, SymInt[] shape, ScalarType dtype, Tensor? nested_absmax, Tensor? nested_code,"
      " Tensor? offset, int nested_blocksize, Tensor lora_B, Tensor norm, Tensor gain, float scaling,"
      " bool beside=False) -> ()");

  // A convolution, whole, and differentiable: y = g * (conv(x, W) + s B conv(x, A)) + bias. x (batch, in, ...), W (out,
  // in / groups, ...) in x's dtype, lora_A (r, in, ...) dense, lora_B (out, r / groups, 1, ...), norm and gain (out,),
  // magnitude `out` numbers in any shape. No gradient flows to weight, norm and gain.
  m.def(
      "conv(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor magnitude, Tensor? bias, Tensor norm,"
      " Tensor gain, float scaling, int[] stride, int[] padding, int[] dilation, int groups,"
      " bool held=False) -> Tensor");

  // lora_A and lora_B, float32, in `dtype`, bfloat16 or float16. Contiguous, of a multiple of 4 numbers, on 16 bytes.
  // CUDA only.
  m.def("cast_factors(Tensor lora_A, Tensor lora_B, ScalarType dtype) -> (Tensor, Tensor)");

  // weight (out, in), each row times its gain (out,), rounded once. bfloat16 or float16, contiguous, rows of a multiple
  // of 16 bytes that start on 16 bytes. CUDA only.
  m.def("scale_rows(Tensor weight, Tensor gain) -> Tensor");

  // Which products layers run on, of library and hopper_product: auto, library, or hopper wherever it fits. With
  // library, adapter_backward also is what it is before Hopper. For tests and measurements; returns what it was.
  m.def("choose_products(str which) -> str");

  // result (rows, columns) = gain * ([left | left_tail] [right | right_tail]^T) + bias on Hopper's tensor cores: sums
  // in fp32, rounded once. left (rows, k), left_tail (rows, r); right (columns, k), right_tail (columns, r), or, when
  // right_transposed, (k, columns) and (r, columns). bfloat16 or float16; gain and bias fp32 (columns,), None: 1 and 0.
  m.def(
      "hopper_product(Tensor left, Tensor right, Tensor? left_tail=None, Tensor? right_tail=None, Tensor? gain=None,"
      " Tensor? bias=None, bool right_transposed=False) -> Tensor");
  // Would it take them? A device of capability 9.0; a multiple of 8 columns; rows that start on 16 bytes.
  m.def(
      "hopper_product_fits(Tensor left, Tensor right, Tensor? left_tail=None, Tensor? right_tail=None,"
      " bool right_transposed=False) -> bool");

  // y and h = x A^T of a linear layer in that one product, which makes h first: x (tokens, in), weight (out, in).
  m.def(
      "hopper_forward(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor gain, Tensor? bias, float scaling)"
      " -> (Tensor y, Tensor h)");
  // Would it take them? As hopper_product_fits; a rank of a multiple of 8 up to 64; a last round of tiles that leaves
  // part of the GPU to h.
  m.def("hopper_forward_fits(Tensor x, Tensor weight, Tensor lora_A) -> bool");
  // The same with the norms, as norm and norm_cached have them: made first too, or launched before it.
  m.def(
      "hopper_forward_norm(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor magnitude, Tensor? bias,"
      " float scaling) -> (Tensor y, Tensor h, Tensor norm, Tensor gain)");
  m.def(
      "hopper_forward_norm_cached(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor magnitude,"
      " Tensor? bias, float scaling, Tensor(a!) cached, Tensor(b!) fingerprint, int epoch=0)"
      " -> (Tensor y, Tensor h, Tensor norm, Tensor gain)");
  m.def("hopper_forward_norm_fits(Tensor x, Tensor weight, Tensor lora_A) -> bool");
  // (dX, dA) = ([grad | P] [W ; A], P^T x), of grad (tokens, out) and P (tokens, r), where the same kernel makes dA
  // last; dA in the dtype of lora_A. beside: the launch before this one made none of grad, weight and x, so that this
  // one waits for it no sooner than it needs P.
  m.def(
      "hopper_backward(Tensor grad, Tensor weight, Tensor P, Tensor lora_A, Tensor x, bool beside=False)"
      " -> (Tensor, Tensor)");
  m.def("hopper_backward_fits(Tensor grad, Tensor weight, Tensor P, Tensor x) -> bool");

  // An embedding, whole, and differentiable: embedding_forward. No gradient flows to weight, norm and gain. held:
  // weight, lora_A and lora_B are parameters of a module, as in linear.
  m.def(
      "embedding(Tensor ids, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor magnitude, Tensor norm, Tensor gain,"
      " float scaling, float embed_scale=1.0, int padding_idx=-1, bool scale_grad_by_freq=False, bool held=False)"
      " -> Tensor");
  // Its parts. ids any shape, int32 or int64; weight (vocab, dim), lora_A (r, vocab), lora_B (dim, r), gain (dim,):
  // y = embed_scale * g * (W[ids] + s A[:, ids]^T B^T), (*ids.shape, dim), in weight's dtype. An id out of range gives
  // a row of NaN and no bad access; the Python function refuses it before, where it can look.
  m.def(
      "embedding_forward(Tensor ids, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor gain, float scaling,"
      " float embed_scale=1.0) -> Tensor");
  // mask: bit 0 lora_A, 1 lora_B, 2 magnitude. padding_idx < 0: none (its column of A gets no gradient). grad_magnitude
  // has norm's dtype, or magnitude_dtype.
  m.def(
      "embedding_backward(Tensor grad_y, Tensor ids, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor norm,"
      " Tensor gain, float scaling, float embed_scale, int padding_idx, bool scale_grad_by_freq, int mask,"
      " ScalarType? magnitude_dtype=None) -> (Tensor grad_A, Tensor grad_B, Tensor grad_magnitude)");

  // bitsandbytes' NF4, bit for bit. packed uint8 (ceil(numel / 2),), first element in the high nibble; absmax fp32
  // (ceil(numel / blocksize),).
  m.def("quantize_nf4(Tensor x, int blocksize=64) -> (Tensor packed, Tensor absmax)");
  // Nested: absmax is uint8 codes into nested_code fp32 (256,), times nested_absmax fp32 (one per nested_blocksize
  // of them, a power of two), plus offset, one fp32 number. All in one launch. offset is a tensor, as bitsandbytes has
  // it: reading it back would wait for the device, and a number would be frozen into compiled graphs. row_gain fp32
  // (shape[0],): each row, already rounded to `dtype`, times it, rounded once more.
  m.def(
      "dequantize_nf4(Tensor packed, Tensor absmax, int blocksize, SymInt[] shape, ScalarType dtype,"
      " Tensor? nested_absmax=None, Tensor? nested_code=None, Tensor? offset=None, int nested_blocksize=256,"
      " Tensor? row_gain=None) -> Tensor");
  // norm of a W (out, in) that is packed in NF4: of the values that dequantize_nf4 gives in `dtype`, without unpacking
  // more than a few rows at a time. A and B are not rounded to `dtype`; n and g are fp32.
  m.def(
      "norm_nf4(Tensor packed, Tensor absmax, int blocksize, SymInt[] shape, ScalarType dtype, Tensor? nested_absmax,"
      " Tensor? nested_code, Tensor? offset, int nested_blocksize, Tensor lora_A, Tensor lora_B, Tensor magnitude,"
      " float scaling) -> (Tensor norm, Tensor gain)");
  // The same through a cache, as norm_cached: the fingerprint covers all bits of A, B and the scales and a sample of
  // every row and column of packed bytes. A new quantisation of W moves its scales.
  m.def(
      "norm_nf4_cached(Tensor packed, Tensor absmax, int blocksize, SymInt[] shape, ScalarType dtype,"
      " Tensor? nested_absmax, Tensor? nested_code, Tensor? offset, int nested_blocksize, Tensor lora_A, Tensor lora_B,"
      " Tensor magnitude, float scaling, Tensor(a!) cached, Tensor(b!) fingerprint, int epoch=0)"
      " -> (Tensor norm, Tensor gain)");
  // linear over W (out, in) packed in NF4, cast to x's dtype, and differentiable: between forward and backward W stays
  // packed. The norms come through the cache, as norm_nf4_cached has it, where `cached` and `fingerprint` are given.
  // rest, of x's shape, goes through W alone (what dropout took away): y + rest W^T.
  m.def(
      "linear_nf4(Tensor x, Tensor packed, Tensor absmax, int blocksize, SymInt[] shape, ScalarType dtype,"
      " Tensor? nested_absmax, Tensor? nested_code, Tensor? offset, int nested_blocksize, Tensor lora_A, Tensor lora_B,"
      " Tensor magnitude, Tensor? bias, float scaling, Tensor? rest=None, Tensor(a!)? cached=None,"
      " Tensor(b!)? fingerprint=None, int epoch=0, bool held=False) -> Tensor");
  // Its parts. W is unpacked inside, so that no graph can keep it. total = y + rest W^T, empty without rest.
  m.def(
      "linear_nf4_forward(Tensor x, Tensor packed, Tensor absmax, int blocksize, SymInt[] shape, ScalarType dtype,"
      " Tensor? nested_absmax, Tensor? nested_code, Tensor? offset, int nested_blocksize, Tensor lora_A, Tensor lora_B,"
      " Tensor magnitude, Tensor? bias, Tensor norm, Tensor gain, float scaling, Tensor? rest)"
      " -> (Tensor y, Tensor h, Tensor total)");
  // mask as in linear_backward, and bit 5 rest.
  m.def(
      "linear_nf4_backward(Tensor grad_y, Tensor? y, Tensor x, Tensor h, Tensor packed, Tensor absmax, int blocksize,"
      " SymInt[] shape, ScalarType dtype, Tensor? nested_absmax, Tensor? nested_code, Tensor? offset,"
      " int nested_blocksize, Tensor lora_A, Tensor lora_B, Tensor magnitude, Tensor? bias, Tensor norm, Tensor gain,"
      " float scaling, int mask) -> (Tensor grad_x, Tensor grad_A, Tensor grad_B, Tensor grad_magnitude,"
      " Tensor grad_bias, Tensor grad_rest)");
  // bitsandbytes' blockwise 8-bit quantisation, for nesting: absmax fp32 (blocks,), its mean already taken off; code
  // fp32 (256,), ascending.
  m.def("quantize_absmax(Tensor absmax, Tensor code, int blocksize=256) -> (Tensor codes, Tensor nested_absmax)");
}

// Gradients are made outside these ops, in the *_autograd.cpp; n and g have none (DoRA, section 4.3).
// Said here, it spares each call torch's way through "not differentiable", which costs as much as a small launch.
TORCH_LIBRARY_IMPL(dora_ext, Autograd, m) {
  for (const char* op :
       {"norm", "norm_cached", "norm_nf4", "norm_nf4_cached", "linear_forward", "linear_forward_cached",
        "linear_backward", "linear_nf4_forward", "linear_nf4_backward", "embedding_forward", "embedding_backward"}) {
    m.impl(op, torch::CppFunction::makeFallthrough());
  }
}
