"""DoraConfig: which layers of a model get an adapter, and which one. The rules are those of PEFT's LoraConfig."""

import math
import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from .nn.base import check_options

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class DoraConfig:
    """What `inject` is to do, checked as soon as it is made; fields mean what they mean in PEFT's LoraConfig.

    Args:
        r, alpha, dropout, use_rslora: as in DoraLinear, for all layers (`alpha` is PEFT's lora_alpha, `dropout` its
            lora_dropout).
        target_modules: "all-linear" (every linear layer but the output head), a regular expression that fits whole
            paths, or a list of paths and ends of paths (["q_proj", "layers.0.mlp.up_proj"]).
        exclude_modules: a regular expression or a list, in the same way; what it fits is left out.
        rank_pattern, alpha_pattern: r and alpha of some layers, {regular expression: value}. An expression has to fit
            the path from a dot, or its start, to its end ("q_proj", r"layers\\.0\\..*", "^lm_head"); the first one in
            the dict that fits counts.
        layers_to_transform: numbers of the blocks whose layers are meant, of those that `target_modules` gives by the
            ends of their paths: "layers.3.mlp.up_proj" is in block 3. Not with a regular expression.
        layers_pattern: names of the lists of blocks that are numbered (["layers"]); by default the first number in the
            path that has a name before it counts.
        init_lora_weights: True: A as torch.nn.Linear has it, B zero; "gaussian": A normal with deviation 1/r, B zero;
            False: both random, which is for tests. Embeddings: A zero, B normal; False: both normal. m always starts
            as the norm of W + s B A.

    Raises:
        TypeError, ValueError: naming the field, what was expected and what came.
    """

    r: int = 8
    alpha: float = 16
    dropout: float = 0.0
    use_rslora: bool = False
    target_modules: str | Collection[str] = ALL_LINEAR
    exclude_modules: str | Collection[str] | None = None
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    layers_to_transform: int | Collection[int] | None = None
    layers_pattern: str | Collection[str] | None = None
    init_lora_weights: bool | str = True

    def __post_init__(self) -> None:
        check_options("DoraConfig", self.r, self.alpha, self.dropout, None)
        if not isinstance(self.use_rslora, bool):
            raise TypeError(f"DoraConfig: use_rslora: expected True or False, got {self.use_rslora!r}")
        _check_names("target_modules", self.target_modules)
        if self.exclude_modules:
            _check_names("exclude_modules", self.exclude_modules)
        for name, kind in (("rank_pattern", int), ("alpha_pattern", (int, float))):
            _check_pattern(name, getattr(self, name), kind)
        self._check_layers()
        init = self.init_lora_weights
        if not (isinstance(init, bool) or (isinstance(init, str) and init.lower() == "gaussian")):
            raise ValueError(f'DoraConfig: init_lora_weights: expected True, False or "gaussian", got {init!r}')

    def _check_layers(self) -> None:
        layers = self.layers_to_transform
        if layers is not None:
            numbers = [layers] if isinstance(layers, int) else layers
            if not _is_list(numbers) or not all(type(n) is int and n >= 0 for n in numbers):
                raise TypeError(
                    f"DoraConfig: layers_to_transform: expected a number or a list of numbers from 0, got {layers!r}"
                )
            if isinstance(self.target_modules, str):
                raise ValueError(
                    "DoraConfig: layers_to_transform: works on a list of target_modules, got "
                    f"target_modules={self.target_modules!r}"
                )
        if self.layers_pattern:
            _check_names("layers_pattern", self.layers_pattern, regex=True)
            if layers is None:
                raise ValueError(f"DoraConfig: layers_pattern: {self.layers_pattern!r} needs layers_to_transform too")

    @property
    def targets_all_linear(self) -> bool:
        return isinstance(self.target_modules, str) and self.target_modules.lower() == ALL_LINEAR

    def excludes(self, name: str) -> bool:
        """`exclude_modules` fits the path `name`."""
        return bool(self.exclude_modules) and name_matches(name, self.exclude_modules)

    def targets(self, name: str) -> bool:
        """`target_modules` and `layers_to_transform` fit the path `name`; "all-linear" is decided by the layer."""
        if isinstance(self.target_modules, str) or name in self.target_modules:
            return name_matches(name, self.target_modules)
        return name_matches(name, self.target_modules) and self._in_transformed_layer(name)

    def _in_transformed_layer(self, name: str) -> bool:
        layers = self.layers_to_transform
        if layers is None or (not isinstance(layers, int) and not layers):
            return True
        # Lazy, so that the first number counts, not that of an expert within the block.
        expressions = [r".*?\.[^.]*\.(?P<idx>\d+)\."]
        if self.layers_pattern:
            patterns = [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern
            expressions = [rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\." for pattern in patterns]
        match = next((m for m in (re.match(e, name) for e in expressions) if m), None)
        return match is not None and int(match["idx"]) in ([layers] if isinstance(layers, int) else layers)

    def rank_and_alpha(self, name: str) -> tuple[int, float]:
        """r and alpha of the layer at path `name`."""
        return _value_for(name, self.rank_pattern, self.r), _value_for(name, self.alpha_pattern, self.alpha)

    def unused_patterns(self, names: Iterable[str]) -> dict[str, list[str]]:
        """Keys of rank_pattern and alpha_pattern that fit none of `names`, by field."""
        names = list(names)
        unused = {
            option: [key for key in getattr(self, option) if not any(_pattern_fits(key, name) for name in names)]
            for option in ("rank_pattern", "alpha_pattern")
        }
        return {option: keys for option, keys in unused.items() if keys}


def name_matches(name: str, patterns: str | Collection[str]) -> bool:
    """PEFT's rule: a string is a regular expression for the whole path, a list holds ends of paths ("q_proj")."""
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    parts = name.split(".")
    return any(".".join(parts[i:]) in patterns for i in range(len(parts)))


def _pattern_fits(key: str, name: str) -> bool:
    return re.match(rf"(.*\.)?({key})$", name) is not None


def _value_for(name: str, patterns: dict, default):
    fitting = next((key for key in patterns if _pattern_fits(key, name)), name)
    return patterns.get(fitting, default)


def _is_list(value) -> bool:
    return isinstance(value, (list, tuple, set, frozenset))


def _check_names(field_name: str, value, regex: bool = False) -> None:
    names = [value] if isinstance(value, str) else value
    if not _is_list(names) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"DoraConfig: {field_name}: expected a string or a list of strings, got {value!r}")
    if not names or not all(names):
        raise ValueError(f"DoraConfig: {field_name}: expected at least one name and none empty, got {value!r}")
    for name in names if regex or isinstance(value, str) else ():
        _check_regex(field_name, name)


def _check_regex(field_name: str, expression: str) -> None:
    try:
        re.compile(expression)
    except re.error as error:
        raise ValueError(f"DoraConfig: {field_name}: {expression!r} is no regular expression: {error}") from error


def _check_pattern(field_name: str, value, kind) -> None:
    what = "whole numbers from 1" if kind is int else "finite numbers"
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise TypeError(f"DoraConfig: {field_name}: expected {{regular expression: value}}, got {value!r}")
    for key, number in value.items():
        _check_regex(field_name, key)
        if not isinstance(number, kind) or isinstance(number, bool):
            raise TypeError(f"DoraConfig: {field_name}[{key!r}]: expected {what}, got {number!r}")
        if not math.isfinite(number) or (kind is int and number < 1):
            raise ValueError(f"DoraConfig: {field_name}[{key!r}]: expected {what}, got {number!r}")
