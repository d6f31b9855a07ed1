"""One adapted linear layer as each library has it, all from the same weights."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

OURS = "dora_ext"
NAMES = {
    "linear": "frozen linear",
    "peft_lora": "PEFT LoRA",
    "peft_dora": "PEFT DoRA",
    "peft_dora_compiled": "PEFT DoRA compiled",
    OURS: "dora_ext DoRA",
}


@dataclass(frozen=True)
class Shape:
    tokens: int
    in_features: int
    out_features: int
    r: int

    def __str__(self) -> str:
        return f"{self.tokens}, {self.in_features} → {self.out_features}, {self.r}"


@dataclass
class Problem:
    """Weights, input and output gradient; every rival gets copies of the same."""

    weight: Tensor
    bias: Tensor | None
    lora_A: Tensor
    lora_B: Tensor
    x: Tensor
    grad_y: Tensor
    scaling: float = 2.0

    @classmethod
    def random(cls, shape: Shape, device: str, dtype: torch.dtype, bias: bool) -> "Problem":
        generator = torch.Generator(device).manual_seed(0)

        def normal(*size, scale=1.0):
            return (torch.randn(size, generator=generator, device=device) * scale).to(dtype)

        n_in, n_out, r = shape.in_features, shape.out_features, shape.r
        return cls(
            weight=normal(n_out, n_in, scale=n_in**-0.5),
            bias=normal(n_out) if bias else None,
            lora_A=normal(r, n_in, scale=n_in**-0.5),
            lora_B=normal(n_out, r, scale=0.1 * r**-0.5),
            x=normal(shape.tokens, n_in),
            grad_y=normal(shape.tokens, n_out),
        )

    @property
    def r(self) -> int:
        return self.lora_A.shape[0]

    def base(self) -> nn.Linear:
        out, n_in = self.weight.shape
        layer = nn.Linear(n_in, out, bias=self.bias is not None, device="meta")
        layer.weight = nn.Parameter(self.weight.clone(), requires_grad=False)
        if self.bias is not None:
            layer.bias = nn.Parameter(self.bias.clone(), requires_grad=False)
        return layer


class Rival:
    """A layer, its training step (forward, and the gradients of x and of all that is trained), and how to make its
    norms stale, as an optimizer step does."""

    def __init__(self, layer: nn.Module, forward: Callable[[Tensor], Tensor], problem: Problem) -> None:
        self.layer, self.forward = layer, forward
        self.x, self.grad_y = problem.x.clone().requires_grad_(), problem.grad_y
        self.trained = {name: p for name, p in layer.named_parameters() if p.requires_grad}
        self.factors = [p for name, p in self.trained.items() if "lora_A" in name or "lora_B" in name]

    def step(self) -> tuple[Tensor, ...]:
        y = self.forward(self.x)
        return torch.autograd.grad(y, (self.x, *self.trained.values()), self.grad_y)

    def touch(self) -> None:
        with torch.no_grad():
            for factor in self.factors:
                factor.add_(0)


def build(name: str, problem: Problem) -> Rival:
    if name == "linear":
        layer = problem.base()
        return Rival(layer, layer, problem)
    if name == OURS:
        layer = _ours(problem)
        return Rival(layer, layer, problem)
    layer = _peft(problem, use_dora=name != "peft_lora")
    # Without dynamic shapes, as someone who trains at one shape would have it.
    forward = torch.compile(layer, dynamic=False) if name == "peft_dora_compiled" else layer
    return Rival(layer, forward, problem)


def _ours(problem: Problem, base: nn.Module | None = None, **options) -> nn.Module:
    from dora_ext.nn import DoraLinear

    layer = DoraLinear.from_base(base or problem.base(), r=problem.r, alpha=problem.scaling * problem.r, **options)
    _set_factors(layer, problem)
    return layer


def _peft(problem: Problem, use_dora: bool, base: nn.Module | None = None) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=problem.r, lora_alpha=problem.scaling * problem.r, use_dora=use_dora, target_modules=["0"], lora_dropout=0.0
    )
    model = get_peft_model(nn.Sequential(base or problem.base()), config, autocast_adapter_dtype=False)
    layer = model.base_model.model[0]
    _set_factors(layer, problem)
    return layer


def _set_factors(layer: nn.Module, problem: Problem) -> None:
    """The problem's A and B, in its dtype; the magnitude stays the norm of W that it was made from."""
    dtype = problem.weight.dtype
    for name, parameter in layer.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(dtype)
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(problem.lora_A)
        layer.lora_B["default"].weight.copy_(problem.lora_B)
