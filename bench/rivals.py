"""One adapted layer (linear, convolution or embedding) as each library has it, all from the same weights."""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .shapes import Shape

OURS = "dora_ext"
COMPILED = "peft_dora_compiled"
ADAPTED = {"peft_lora": "PEFT LoRA", "peft_dora": "PEFT DoRA", COMPILED: "PEFT DoRA compiled", OURS: "dora_ext DoRA"}
# In NF4 with a block size of 64: half a byte, its share of the scale, and of the scales' scale.
BYTES_PER_NF4_WEIGHT = 0.5 + 1 / 64 + 4 / (64 * 256)


@dataclass
class Problem:
    """Weights, input and output gradient; every rival gets copies of the same."""

    layer: nn.Module  # on the meta device: the geometry
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

        layer, r = shape.layer(bias).to(dtype), shape.r
        embedding = isinstance(layer, nn.Embedding)
        # What a norm is taken over: all that an output feature sees, an embedding's dimension the whole vocabulary.
        out, *rest = reversed(layer.weight.shape) if embedding else layer.weight.shape
        scale = math.prod(rest) ** -0.5
        weight = normal(*layer.weight.shape, scale=scale)
        bias_values = normal(out) if getattr(layer, "bias", None) is not None else None
        lora_A, lora_B = normal(r, *rest, scale=scale), normal(out, r, *[1] * (len(rest) - 1), scale=0.1 * r**-0.5)
        if embedding:
            x = torch.randint(layer.num_embeddings, shape.input_size(), generator=generator, device=device)
        else:
            x = normal(*shape.input_size())
        grad_y = normal(*layer(x.to("meta")).shape)
        return cls(layer, weight, bias_values, lora_A, lora_B, x, grad_y)

    @property
    def r(self) -> int:
        return self.lora_A.shape[0]

    def base(self) -> nn.Module:
        layer = copy.deepcopy(self.layer)
        layer.weight = nn.Parameter(self.weight.clone(), requires_grad=False)
        if self.bias is not None:
            layer.bias = nn.Parameter(self.bias.clone(), requires_grad=False)
        return layer


class Rival:
    """A layer, its training step (forward, and the gradients of x, unless x is ids, and of all that is trained), and
    how to make its norms stale, as an optimizer step does."""

    def __init__(self, layer: nn.Module, forward: Callable[[Tensor], Tensor], problem: Problem) -> None:
        self.layer, self.forward = layer, forward
        self.x, self.grad_y = problem.x.clone(), problem.grad_y
        self.x.requires_grad_(self.x.is_floating_point())
        self.trained = {name: p for name, p in layer.named_parameters() if p.requires_grad}
        self.factors = [p for name, p in self.trained.items() if "magnitude" not in name]
        self.wanted = ([self.x] if self.x.requires_grad else []) + list(self.trained.values())

    def step(self) -> tuple[Tensor, ...]:
        """The gradients; of a frozen embedding, which has none, its answer."""
        y = self.forward(self.x)
        return torch.autograd.grad(y, self.wanted, self.grad_y) if self.wanted else (y,)

    def touch(self) -> None:
        with torch.no_grad():
            for factor in self.factors:
                factor.add_(0)


def build(name: str, problem: Problem) -> Rival:
    """The rival of that name: an adapted layer, or else the bare one."""
    if name == OURS:
        layer = our_layer(problem)
    elif name.startswith("peft_"):
        layer = peft_layer(problem, use_dora=name != "peft_lora")
    else:
        layer = problem.base()
    # Without dynamic shapes, as someone who trains at one shape would have it.
    forward = torch.compile(layer, dynamic=False) if name == COMPILED else layer
    return Rival(layer, forward, problem)


def our_layer(problem: Problem, base: nn.Module | None = None, **options) -> nn.Module:
    from dora_ext import nn as dora_nn

    base = base or problem.base()
    kinds = {
        nn.Conv1d: dora_nn.DoraConv1d,
        nn.Conv2d: dora_nn.DoraConv2d,
        nn.Conv3d: dora_nn.DoraConv3d,
        nn.Embedding: dora_nn.DoraEmbedding,
    }
    # What is left are linear layers, packed ones too.
    kind = kinds.get(type(base), dora_nn.DoraLinear)
    layer = kind.from_base(base, r=problem.r, alpha=problem.scaling * problem.r, **options)
    set_factors(layer, problem)
    return layer


def peft_layer(problem: Problem, use_dora: bool, base: nn.Module | None = None) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=problem.r, lora_alpha=problem.scaling * problem.r, use_dora=use_dora, target_modules=["0"], lora_dropout=0.0
    )
    model = get_peft_model(nn.Sequential(base or problem.base()), config, autocast_adapter_dtype=False)
    layer = model.base_model.model[0]
    set_factors(layer, problem)
    return layer


def linear4bit(problem: Problem) -> nn.Module:
    """The problem's linear layer as bitsandbytes packs it."""
    from bitsandbytes.nn import Linear4bit

    dense, dtype = problem.base(), problem.weight.dtype
    bias = dense.bias is not None
    layer = Linear4bit(dense.in_features, dense.out_features, bias, compute_dtype=dtype, quant_type="nf4").to(dtype)
    layer.load_state_dict(dense.state_dict())
    return layer.to(problem.weight.device)


def set_factors(layer: nn.Module, problem: Problem) -> None:
    """The problem's A and B, in its dtype; the magnitude stays the norm of W that it was made from."""
    for name, parameter in layer.named_parameters():
        if "lora_" in name:
            parameter.data = parameter.data.to(problem.weight.dtype)
    with torch.no_grad():
        for ours, given in zip(factors(layer), (problem.lora_A, problem.lora_B), strict=True):
            ours.copy_(given)


def factors(layer: nn.Module) -> tuple[nn.Parameter, nn.Parameter]:
    """A and B of an adapted layer, ours or PEFT's."""
    if "default" in getattr(layer, "lora_embedding_A", ()):
        return layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight
