"""Kernels that are bound by memory, alone and with cold caches: norms, dense and packed in NF4, the column norm of an
embedding next to PEFT's, and dequantisation next to bitsandbytes'. Each beside its floor, the time in which a copy
moves its bytes, measured in the same run. CUDA only."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from dora_ext.ops import NF4Tensor, quantize_nf4

from .measure import device_ms_of, failure

KEY = "kernels"
TITLE = "Kernels alone"
NAMES = {
    "norm": "norm, bfloat16",
    "peft_norm": "norm, PEFT",
    "norm_nf4": "norm, NF4",
    "dequantize_nf4": "dequantize NF4",
    "bitsandbytes": "dequantize NF4, bitsandbytes",
}
HEADING = "out × in, r"
NORMS = ("norm", "norm_nf4")
ALL = (*NORMS, "dequantize_nf4", "bitsandbytes")
EMBEDDING = "embedding"
# The layer, (out, in), r, what is measured. An embedding's weight is (in, out), its norm one of columns.
ROWS = [
    ("linear", (4096, 4096), 16, ALL),
    ("linear", (4096, 4096), 64, NORMS),
    ("linear", (4096, 4096), 384, NORMS),
    ("linear", (14336, 4096), 16, ALL),
    ("linear", (14336, 4096), 64, NORMS),
    ("linear", (14336, 4096), 384, NORMS),
    ("linear", (4096, 14336), 16, ALL),
    ("linear", (4096, 14336), 64, NORMS),
    (EMBEDDING, (4096, 128256), 16, ("norm", "peft_norm")),
]
COLD = 256 << 20  # bytes of weights that take turns: more than any L2 holds


def run(device: str, quick: bool, note) -> list[dict]:
    if device != "cuda":
        return []
    rows = []
    copied = torch.empty(COLD // 2, dtype=torch.int8, device="cuda")
    target = torch.empty_like(copied)
    bytes_per_ms = 2 * COLD // 2 / device_ms_of(lambda: target.copy_(copied), 8 if quick else 30)
    for layer, shape, r, names in ROWS[: 1 if quick else None]:
        note(f"{KEY}: {layer}, {shape}, r {r}")
        rivals = {}
        for name in names:
            try:
                us, moved = _measure(name, shape, r, layer == EMBEDDING, 8 if quick else 30)
                rivals[name] = {"us": us, "copy_us": 1e3 * moved / bytes_per_ms}
            except Exception as error:
                rivals[name] = failure(error)
            torch.cuda.empty_cache()
        rows.append({"layer": layer, "out": shape[0], "in": shape[1], "r": r, "rivals": rivals})
    return rows


def _measure(name: str, shape: tuple[int, int], r: int, transposed: bool, repeats: int) -> tuple[float, int]:
    """Microseconds of one call, and the bytes that it reads of W and writes."""
    dense, packed = 2 * math.prod(shape), math.prod(shape) // 2
    count = math.ceil(COLD / (packed if name == "norm_nf4" else dense))
    stored = shape[::-1] if transposed else shape
    weights = [torch.randn(stored, device="cuda", dtype=torch.bfloat16) for _ in range(count)]
    if name == "bitsandbytes":
        calls, moved = _bitsandbytes(weights)
    elif name == "norm":
        lora_A, lora_B, magnitude = _factors(shape, r)
        calls = [lambda w=w: torch.ops.dora_ext.norm(w, lora_A, lora_B, magnitude, 2.0, transposed) for w in weights]
        moved = dense
    elif name == "peft_norm":
        calls, moved = [peft_embedding_norm(w, *_factors(shape, r)[:2]) for w in weights], dense
    else:
        tensors = [quantize_nf4(w) for w in weights]
        moved = sum(t.nbytes for t in tensors[0] if isinstance(t, Tensor))
        if name == "norm_nf4":
            calls = [_norm_nf4(q, *_factors(shape, r)) for q in tensors]
        else:
            calls = [lambda q=q: torch.ops.dora_ext.dequantize_nf4(*q.operands()) for q in tensors]
            moved += dense
    return 1e3 * device_ms_of(lambda: [call() for call in calls], repeats) / count, moved


def _factors(shape: tuple[int, int], r: int) -> tuple[Tensor, Tensor, Tensor]:
    lora_A, lora_B = torch.randn(r, shape[1], device="cuda"), torch.randn(shape[0], r, device="cuda")
    return lora_A.bfloat16(), lora_B.bfloat16(), torch.rand(shape[0], device="cuda")


def peft_embedding_norm(weight: Tensor, lora_A: Tensor, lora_B: Tensor) -> Callable[[], Tensor]:
    """As in each forward of PEFT's embedding: B A, and the norm of W + s B A; W (vocab, dim), s = 2."""
    from peft.tuners.lora.dora import DoraEmbeddingLayer

    layer = DoraEmbeddingLayer(fan_in_fan_out=True)

    def norm() -> Tensor:
        delta = layer.get_lora_weight(lora_A.T, lora_B.T)
        return layer.get_weight_norm(weight, delta, 2.0)

    return norm


def _norm_nf4(q: NF4Tensor, lora_A: Tensor, lora_B: Tensor, magnitude: Tensor) -> Callable:
    return lambda: torch.ops.dora_ext.norm_nf4(*q.operands(), lora_A, lora_B, magnitude, 2.0)


def _bitsandbytes(weights: list[Tensor]) -> tuple[list[Callable], int]:
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    tensors = [quantize_4bit(w, blocksize=64, compress_statistics=True, quant_type="nf4") for w in weights]
    packed, state = tensors[0]
    moved = packed.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes + weights[0].nbytes
    return [lambda t=t: dequantize_4bit(*t) for t in tensors], moved


def table(rows: list[dict]) -> list[str]:
    """Markdown: a column for each kernel, a cell for its time and what it is of a copy's."""
    if not rows:
        return ["Measured with CUDA only."]
    names = [n for n in NAMES if any(n in row["rivals"] for row in rows)]
    lines = [
        "Each cell: µs, and that over the time in which a copy moves the bytes that it reads of W and writes.",
        "",
        f"| {HEADING} | " + " | ".join(NAMES[n] for n in names) + " |",
        "|---" * (len(names) + 1) + "|",
    ]
    for row in rows:
        cells = [_cell(row["rivals"].get(n)) for n in names]
        lines.append(f"| {label(row)} | " + " | ".join(cells) + " |")
    return lines


def label(row: dict) -> str:
    # Only linear layers were measured before rows said what they are of.
    what = f"{EMBEDDING} " if row.get("layer") == EMBEDDING else ""
    return f"{what}{row['out']} × {row['in']}, {row['r']}"


def _cell(result: dict | None) -> str:
    if result is None:
        return ""
    return "failed" if "error" in result else f"{result['us']:.1f}, {result['us'] / result['copy_us']:.2f}"
