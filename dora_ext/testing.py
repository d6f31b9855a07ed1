"""What tests and benchmarks share: devices, dtypes, fresh inputs, and the one measure of error."""

import pytest
import torch
from torch import Tensor

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]

# Bound on |out - ref| / |ref| for one op in each dtype. Half precision: every tensor on the way is rounded once
# (2^-9 for bfloat16, 2^-12 for float16, less on average), a few times over.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 6e-3, torch.float16: 1e-3}


def relative_error(out: Tensor, ref: Tensor) -> float:
    """|out - ref| / |ref| in float64; NaN and infinity never pass a comparison with it."""
    out, ref = out.detach().double().cpu(), ref.detach().double().cpu()
    assert out.shape == ref.shape, f"shape {tuple(out.shape)}, expected {tuple(ref.shape)}"
    scale = ref.norm().item()
    error = (out - ref).norm().item()
    return error / scale if scale else error


def assert_close(out: Tensor, ref: Tensor, tolerance: float, what: str = "result") -> None:
    error = relative_error(out, ref)
    assert error <= tolerance, f"{what}: relative error {error:.3g}, allowed {tolerance:.3g}"


def adapter(
    out_features: int,
    in_features: int,
    r: int,
    *,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    param_dtype: torch.dtype | None = None,
    transposed: bool = False,
    bias: bool = True,
    zero_rows: tuple[int, ...] = (),
) -> dict[str, Tensor]:
    """A frozen weight and an adapter in mid-training: B is not zero and m is not n. Values are exact in `dtype`."""
    param_dtype = param_dtype or dtype
    weight = torch.randn(out_features, in_features, dtype=torch.float64) / in_features**0.5
    lora_B = torch.randn(out_features, r, dtype=torch.float64) / (2 * r**0.5)
    for row in zero_rows:
        weight[row] = lora_B[row] = 0
    tensors = {
        "weight": (weight.T.contiguous() if transposed else weight).to(dtype),
        "lora_A": (torch.randn(r, in_features, dtype=torch.float64) / in_features**0.5).to(param_dtype),
        "lora_B": lora_B.to(param_dtype),
        "magnitude": (torch.rand(out_features, dtype=torch.float64) + 0.5).to(param_dtype),
    }
    if bias:
        tensors["bias"] = torch.randn(out_features, dtype=torch.float64).to(param_dtype)
    tensors = {name: t.to(device) for name, t in tensors.items()}
    for name, t in tensors.items():
        t.requires_grad_(name != "weight")
    return tensors


def doubles(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same values in float64 on the CPU, as fresh leaves: what the reference computes with."""
    return {k: t.detach().double().cpu().requires_grad_(t.requires_grad) for k, t in tensors.items()}
