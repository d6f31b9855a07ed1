"""The measurements of one model at one moment.

The paper (arXiv 2402.09353, section 3.2) compares a trained weight with the pre-trained W_0, column by column, k
columns in all; a column belongs to one output feature, and is a row of torch's W (out, in):

    magnitude change  dM = mean over columns |m_t - m_0|              (equation 3)
    direction change  dD = mean over columns (1 - cos(V_t, W_0))      (equation 4)

Of a DoRA layer, m_t is the trained magnitude m itself, V_t = W + s B A, W_0 = W, the frozen base weight, and
m_0 = |W|, where m starts. Every output feature is a column: of a convolution an output channel with all of its kernel,
of an embedding one dimension over the whole vocabulary.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from statistics import fmean

import torch
from torch import Tensor, nn

from ..distributed import gathered, whole
from ..injection import unwrapped
from ..nn import DoraBase
from ..nn.base_weight import dense_weight
from ..ops import norm_and_gain, weight_norm
from ..ops._registry import accumulate_dtype, without_autocast


@dataclass(frozen=True)
class Spread:
    """Of one number per output feature; `std` is that of the features themselves, 0 for a single one."""

    mean: float
    std: float
    min: float
    max: float


@dataclass(frozen=True)
class LayerAnalysis:
    """One layer, or one kind of layer (`by_kind`).

    Attributes:
        kind: last part of the layer's path ("q_proj"), or the base layer's class where that is a number.
        magnitude, norm, ratio: m, n = |W + s B A| and the gain m / n (0 where n is 0), over the output features.
        magnitude_change: dM, the paper's equation 3. direction_change: dD, equation 4, in [0, 2]; a feature whose
            weights are all zero has no direction and counts as 0.
        relative_magnitude_change: mean of |m - m_0| / m_0; features with m_0 = 0 count as 0.
        magnitude_grad_norm: |dm|, the norm of m's gradient; None where m has none.
    """

    kind: str
    magnitude: Spread
    norm: Spread
    ratio: Spread
    magnitude_change: float
    relative_magnitude_change: float
    direction_change: float
    magnitude_grad_norm: float | None

    def scalars(self) -> dict[str, float]:
        """Every number by its name: "magnitude/mean", "direction_change", ...; a gradient that is None is left out."""
        numbers = {}
        for field in fields(self)[1:]:
            value = getattr(self, field.name)
            if isinstance(value, Spread):
                numbers |= {f"{field.name}/{part.name}": getattr(value, part.name) for part in fields(Spread)}
            elif value is not None:
                numbers[field.name] = value
        return numbers


def analyse(model: nn.Module, adapter: str | None = None) -> dict[str, LayerAnalysis]:
    """Every DoRA layer of `model`, dora_ext's or PEFT's, by its path in the base model.

    Nothing in the model changes, nothing as large as a weight outlives its layer, and the device is waited for once.
    For gradients call it between backward and zero_grad.

    Args:
        adapter: which of a PEFT model's adapters; needed only where several DoRA adapters are active.

    Raises:
        ValueError: no DoRA layer, none with that adapter, several adapters to choose from, or a layer whose base weight
            PEFT has merged the adapter into.
    """
    model = unwrapped(model)
    names, kinds, rows = [], [], []
    with torch.no_grad():
        for name, module, chosen in _dora_modules(model, adapter):
            with gathered(module):
                rows.append(_numbers(*_parts(module, chosen), module.lora_magnitude_vector[chosen].weight.grad))
            last = name.rpartition(".")[2]
            kinds.append(type(module.base_layer).__name__ if last.isdigit() or not last else last)
            names.append(name)
        if not rows:
            which = "an active DoRA adapter" if adapter is None else f"a DoRA adapter {adapter!r}"
            raise ValueError(f"analyse: model: {type(model).__name__} has no layer with {which}")
        if len({row.device for row in rows}) > 1:
            rows = [row.cpu() for row in rows]
        table = torch.stack(rows).tolist()
    return {name: _from_row(kind, row) for name, kind, row in zip(names, kinds, table, strict=True)}


def by_kind(layers: dict[str, LayerAnalysis]) -> dict[str, LayerAnalysis]:
    """Layers of one kind as one: means of their numbers, and the least `min` and the greatest `max`."""
    groups: dict[str, list[LayerAnalysis]] = {}
    for layer in layers.values():
        groups.setdefault(layer.kind, []).append(layer)
    return {kind: _together(kind, group) for kind, group in groups.items()}


def summary(model: nn.Module, adapter: str | None = None, *, per_layer: bool = False) -> str:
    """`analyse` as a table, a row for each kind of layer (and how many there are), or for each layer."""
    layers = analyse(model, adapter)
    rows = [("layer" if per_layer else "kind", "m", "n", "m/n", "min", "max", "ΔM", "ΔD", "|grad m|")]
    for name, a in (layers if per_layer else by_kind(layers)).items():
        label = name if per_layer else f"{name} ({sum(layer.kind == name for layer in layers.values())})"
        numbers = [a.magnitude.mean, a.norm.mean, a.ratio.mean, a.ratio.min, a.ratio.max]
        numbers += [a.magnitude_change, a.direction_change, a.magnitude_grad_norm]
        rows.append((label, *("-" if x is None else f"{x:.4g}" for x in numbers)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _dora_modules(model: nn.Module, adapter: str | None) -> Iterator[tuple[str, nn.Module, str]]:
    """Path, layer and adapter of all that is to be analysed. PEFT's layers are known by their parts: it need not be
    there, and whose classes they are (PEFT's own or ours in their place) makes no difference."""
    for path, module in model.named_modules():
        if not hasattr(module, "base_layer") or not getattr(module, "lora_magnitude_vector", None):
            continue
        name, there = path.removeprefix("base_model.model."), list(module.lora_magnitude_vector)
        active = there if isinstance(module, DoraBase) else [a for a in module.active_adapters if a in there]
        chosen = active if adapter is None else [a for a in there if a == adapter]
        if len(chosen) > 1:
            raise ValueError(f"analyse: {name}: several DoRA adapters are active, name one: {', '.join(chosen)}")
        if chosen and module.merged and not isinstance(module, DoraBase):
            raise ValueError(f"analyse: {name} is merged, its base weight is gone: call unmerge_adapter() first")
        yield from ((name, module, a) for a in chosen)


def _parts(module: nn.Module, adapter: str) -> tuple[Tensor, Tensor, Tensor, Tensor, float, bool]:
    """W (dense), A, B, m, on W's device, s, and whether W is (in, out)."""
    if isinstance(module, DoraBase):
        return *module._tensors(), module.scaling, module.transposed
    embedding = adapter in module.lora_embedding_A
    if embedding:
        factors = module.lora_embedding_A[adapter], module.lora_embedding_B[adapter]
    else:
        factors = module.lora_A[adapter].weight, module.lora_B[adapter].weight
    weight = dense_weight(module.base_layer)
    tensors = (whole(t).to(weight.device) for t in (*factors, module.lora_magnitude_vector[adapter].weight))
    return weight, *tensors, float(module.scaling[adapter]), embedding or getattr(module, "fan_in_fan_out", False)


def _numbers(weight, lora_A, lora_B, magnitude, scaling, transposed, gradient) -> Tensor:
    """What `_from_row` reads, float64, on the weight's device: no waiting for it here."""
    with without_autocast(weight.device):
        options = {"scaling": scaling, "transposed": transposed}
        norm, gain = norm_and_gain(weight, lora_A, lora_B, magnitude, **options)
        # The same kernel that gave m its start: until something is trained, the change is 0 to the last bit.
        start = weight_norm(weight, lora_A, torch.zeros_like(lora_B), **options)
        m, n, g, m_0 = (t.flatten().double() for t in (magnitude, norm, gain, start))
        spreads = torch.stack([m, n, g])
        change = (m - m_0).abs()
        direction = _direction_change(weight, lora_A, lora_B, scaling, transposed, m_0, n)
    dm = m.new_full((), -1) if gradient is None else whole(gradient).to(m.device, torch.float64).norm()
    return torch.cat([
        torch.stack([spreads.mean(1), spreads.std(1, correction=0), spreads.amin(1), spreads.amax(1)], 1).flatten(),
        torch.stack([change.mean(), torch.where(m_0 > 0, change / m_0, 0.0).mean(), direction.mean(), dm]),
    ])  # fmt: skip


def _direction_change(weight, lora_A, lora_B, scaling, transposed, w_norm, v_norm) -> Tensor:
    """1 - cos(w + d, w) (out,) for each feature's w and d = s b A, without forming B A; float64.

    1 minus a cosine loses all digits of a small angle. With p = w . (w + d) and d' the part of d across w, it equals
    |d'|^2 |w| / (|v| (|w| |v| + p)), where nothing cancels as long as p >= 0; for p < 0 the plain form is exact.
    """
    if transposed:
        weight = weight.T
    groups = lora_A.shape[1] // weight.shape[1] if weight.dim() > 2 else 1
    dtype = accumulate_dtype(weight.dtype)
    along, squares = [], []
    for q, (w, b, a) in enumerate(
        zip(weight.chunk(groups), lora_B.flatten(1).chunk(groups), lora_A.chunk(groups), strict=True)
    ):
        own = a if groups == 1 else a[:, q * w.shape[1] : (q + 1) * w.shape[1]]
        b = scaling * b.double()
        products = w.flatten(1).to(dtype) @ own.flatten(1).to(dtype).T
        along.append((products.double() * b).sum(1))
        a = a.flatten(1).double()
        squares.append((b @ (a @ a.T) * b).sum(1))
    wd, dd, ww = torch.cat(along), torch.cat(squares), w_norm**2
    across = (dd - wd**2 / ww).clamp_min(0)
    lengths, p = w_norm * v_norm, ww + wd
    change = torch.where(p >= 0, across * w_norm / (v_norm * (lengths + p)), 1 - p / lengths)
    return torch.where(lengths > 0, change, 0.0)


def _from_row(kind: str, row: list[float]) -> LayerAnalysis:
    spreads = (Spread(*row[i : i + 4]) for i in (0, 4, 8))
    return LayerAnalysis(kind, *spreads, *row[12:15], None if row[15] == -1 else row[15])


def _together(kind: str, group: list[LayerAnalysis]) -> LayerAnalysis:
    def spread(field: str) -> Spread:
        parts = [getattr(layer, field) for layer in group]
        means = fmean(p.mean for p in parts), fmean(p.std for p in parts)
        return Spread(*means, min(p.min for p in parts), max(p.max for p in parts))

    def mean(field: str) -> float | None:
        values = [getattr(layer, field) for layer in group]
        return None if None in values else fmean(values)

    names = [field.name for field in fields(LayerAnalysis)]
    return LayerAnalysis(kind, *map(spread, names[1:4]), *map(mean, names[4:]))
