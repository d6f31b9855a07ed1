"""Adapters on disk, in PEFT's format: adapter_config.json and adapter_model.safetensors, to and from PEFT alike.

A file is written beside the old one and takes its place only when all of it is on the disk; a file is read, checked
against the model whole, and only then does anything in the model change.
"""

import json
import math
import os
import re
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor, nn

from .config import DoraConfig
from .distributed import copy_whole, gathered, is_first, on_first, shared_among_processes, whole, whole_shape
from .files import AdapterError, read_safetensors, refuse, replace_files
from .injection import (
    dora_layers,
    flags_kept_on_error,
    folded_layers,
    new_layers,
    place,
    target_names,
    unwrapped,
    warn_of_shared_weights,
)

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
PREFIX = "base_model.model."
# Options of PEFT that change what a layer computes and that these layers do not have.
_FOREIGN_OPTIONS = (
    "modules_to_save", "lora_bias", "layer_replication", "target_parameters", "trainable_token_indices", "use_qalora",
    "use_bdlora", "alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config", "ensure_weight_tying",
)  # fmt: skip
# Ways of PEFT to start that take something out of the base weights: such a file fits those weights alone.
_BASE_CHANGING_STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga")


def save_adapter(
    model: nn.Module, folder: str | os.PathLike, *, base_model_name: str | None = None, task_type: str | None = None
) -> None:
    """Write the DoRA layers of `model` to `folder`, for `load_adapter` and for PEFT's PeftModel.from_pretrained.

    Of a model that FSDP2 or ZeRO-3 has spread over the processes, all of them must call this: the parameters are
    collected one after the other, process 0 writes, and all return, or raise, when that is done. Inside a
    DistributedDataParallel every process has it all: 0 writes, the others return at once.

    Args:
        base_model_name: name or path of the base model, kept in the file for its reader.
        task_type: PEFT's, e.g. "CAUSAL_LM"; decides only which PeftModel class wraps the model there.

    Raises:
        ValueError: the model has no DoRA layer, or one whose parameters are on meta or partitioned away, or layers
            that load_kohya has folded.
        OSError: the folder cannot be written or the disk is full; files from an earlier save are whole.
    """
    replicated = isinstance(getattr(model, "_orig_mod", model), nn.parallel.DistributedDataParallel)
    model = unwrapped(model)
    layers = dora_layers(model)
    for name in folded_layers(model):
        raise ValueError(f"save_adapter: {name} has a magnitude for each input, for which PEFT's files have no place")
    if not layers:
        raise ValueError(f"save_adapter: model: {type(model).__name__} has no DoRA layer")
    shared = shared_among_processes(model)
    if replicated and not is_first():
        return
    tensors = {}
    for name, layer in layers.items():
        for key, parameter in adapter_parameters(layer).items():
            with gathered([parameter]):
                value = whole(parameter.detach())
                if value.numel() == 0 or value.is_meta:
                    raise ValueError(f"save_adapter: {name}.{key} is empty here: gather partitioned parameters first")
                if is_first() or not shared:
                    tensors[f"{PREFIX}{name}.{key}"] = value.to("cpu", copy=True).contiguous()
    config = _config(model, layers) | {"base_model_name_or_path": base_model_name, "task_type": task_type}
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"

    from safetensors.torch import save_file  # here, so that importing dora_ext needs torch alone

    writers = {
        WEIGHTS_NAME: lambda path: save_file(tensors, path, metadata={"format": "pt"}),
        CONFIG_NAME: lambda path: path.write_text(text),
    }
    run = on_first if shared else lambda action: action()
    run(lambda: replace_files(Path(folder), writers))


def load_adapter(model: nn.Module, folder: str | os.PathLike) -> nn.Module:
    """Load an adapter saved by `save_adapter` or by PEFT into `model`, whose layers are replaced where they are not yet
    DoRA layers. All of it or nothing: whatever is wrong is found before the model changes.

    Returns:
        `model` itself.

    Raises:
        FileNotFoundError: no adapter in `folder`. AdapterError: one that is corrupt, or not for this model.
    """
    folder, inner = Path(folder), unwrapped(model)
    config = _read_config(folder / CONFIG_NAME)
    pickled = folder / "adapter_model.bin"
    weights = folder / WEIGHTS_NAME
    tensors = read_safetensors("load_adapter", pickled if pickled.is_file() and not weights.is_file() else weights)
    with flags_kept_on_error(inner) as flags:
        try:
            names = target_names(inner, config)
            new = new_layers(inner, config, names)
        except (TypeError, ValueError) as error:
            raise AdapterError(f"load_adapter: {folder / CONFIG_NAME}: {error}") from error
        layers = dora_layers(inner) | new
        _check(layers, config, tensors)
        warn_of_shared_weights(inner, names)
    with torch.no_grad():
        for name, layer in layers.items():
            for key, parameter in (adapter_parameters(layer) | _base_parameters(layer)).items():
                value = tensors.get(f"{PREFIX}{name}.{key}")
                if value is not None:
                    with gathered([parameter], write=True):
                        copy_whole(parameter, value)
    place(inner, new, flags)
    return model


def adapter_parameters(layer: nn.Module) -> dict[str, nn.Parameter]:
    """A DoRA layer's own parameters by their names in the file: without "default", the magnitude without ".weight"."""
    parameters = {}
    for name, parameter in layer.named_parameters():
        if name.startswith("lora_"):
            key = name.replace(".default", "")
            if key.startswith("lora_magnitude_vector"):
                key = key.removesuffix(".weight")
            parameters[key] = parameter
    return parameters


def _base_parameters(layer: nn.Module) -> dict[str, nn.Parameter]:
    """The layer's own weight and bias by their names in the file, where PEFT puts those of a language model's embedding
    and head if it has an adapter on one of them."""
    if not isinstance(layer.base_layer, (nn.Embedding, nn.Linear)) or layer.quantised:
        return {}
    return {f"base_layer.{name}": parameter for name, parameter in layer.base_layer.named_parameters()}


def _config(model: nn.Module, layers: dict[str, nn.Module]) -> dict:
    r, alpha, dropout, use_rslora = (
        Counter(values).most_common(1)[0][0]
        for values in zip(*((m.r, m.alpha, m.dropout, m.use_rslora) for m in layers.values()), strict=True)
    )
    # PEFT has one use_rslora for all layers; a layer that differs says so through its alpha.
    alphas = {n: m.alpha if m.use_rslora == use_rslora else m.scaling * _divisor(m.r, use_rslora)
              for n, m in layers.items()}  # fmt: skip
    return {
        "peft_type": "LORA",
        "use_dora": True,
        "r": r,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "use_rslora": use_rslora,
        "rank_pattern": {f"^{re.escape(n)}": m.r for n, m in layers.items() if m.r != r},
        "alpha_pattern": {f"^{re.escape(n)}": a for n, a in alphas.items() if a != alpha},
        "target_modules": _target_modules(model, layers),
        "fan_in_fan_out": all(getattr(m, "fan_in_fan_out", False) for m in layers.values()),
        "bias": "none",
        "inference_mode": True,
    }


def _divisor(r: int, use_rslora: bool) -> float:
    return math.sqrt(r) if use_rslora else r


def _target_modules(model: nn.Module, layers: dict[str, nn.Module]) -> list[str] | str:
    """The last parts of the names where these fit no other layer, else a regular expression of all whole names."""
    ends = {name.rpartition(".")[2] for name in layers}
    named = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in ends}
    return sorted(ends) if named == set(layers) else "|".join(re.escape(name) for name in layers)


def _read_config(path: Path) -> DoraConfig:
    if path.parent.is_file():
        raise AdapterError(f"load_adapter: {path.parent}: expected PEFT's folder, got a file: perhaps load_kohya's")
    if not path.is_file():
        raise FileNotFoundError(f"load_adapter: no {CONFIG_NAME} in {path.parent}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise AdapterError(f"load_adapter: {path}: not JSON: {error}") from error
    if not isinstance(config, dict):
        raise AdapterError(f"load_adapter: {path}: expected an object, got {type(config).__name__}")
    if config.get("peft_type") != "LORA" or config.get("use_dora") is not True:
        got = f"peft_type {config.get('peft_type')!r}, use_dora {config.get('use_dora')!r}"
        raise AdapterError(f"load_adapter: {path}: expected a DoRA adapter (peft_type LORA, use_dora true), got {got}")
    foreign = [name for name in _FOREIGN_OPTIONS if config.get(name)]
    foreign += ["bias"] if config.get("bias", "none") != "none" else []
    if foreign:
        raise AdapterError(f"load_adapter: {path}: options that dora_ext does not have: {', '.join(foreign)}")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_BASE_CHANGING_STARTS):
        raise AdapterError(
            f"load_adapter: {path}: init_lora_weights {init!r} has changed the base weights; save the adapter with "
            "PEFT's path_initial_model_for_weight_conversion"
        )
    for name, kinds in (("r", int), ("lora_alpha", (int, float))):
        value = config.get(name)
        if not isinstance(value, kinds) or isinstance(value, bool) or not math.isfinite(value) or value <= 0:
            raise AdapterError(f"load_adapter: {path}: {name}: expected a positive number, got {value!r}")
    if not config.get("target_modules"):
        raise AdapterError(f"load_adapter: {path}: target_modules is missing")
    try:
        return DoraConfig(
            r=config["r"], alpha=config["lora_alpha"], dropout=config.get("lora_dropout") or 0.0,
            use_rslora=bool(config.get("use_rslora")),
            target_modules=config["target_modules"], exclude_modules=config.get("exclude_modules"),
            rank_pattern=config.get("rank_pattern") or {}, alpha_pattern=config.get("alpha_pattern") or {},
            layers_to_transform=config.get("layers_to_transform"), layers_pattern=config.get("layers_pattern"),
        )  # fmt: skip
    except (TypeError, ValueError) as error:
        raise AdapterError(f"load_adapter: {path}: {error}") from error


def _check(layers: dict[str, nn.Module], config: DoraConfig, tensors: dict[str, Tensor]) -> None:
    expected, optional, problems = {}, {}, []
    for name, layer in layers.items():
        for key, parameter in adapter_parameters(layer).items():
            expected[f"{PREFIX}{name}.{key}"] = whole_shape(parameter)
        for key, parameter in _base_parameters(layer).items():
            optional[f"{PREFIX}{name}.{key}"] = whole_shape(parameter)
        if layer.merged:
            problems.append(f"{name} is merged: call unmerge() first")
        r, alpha = config.rank_and_alpha(name)
        if layer.r != r:
            problems.append(f"{name}: rank {r} in the file, {layer.r} in the model")
        scaling = alpha / _divisor(r, config.use_rslora)
        if not math.isclose(scaling, layer.scaling, rel_tol=1e-6):
            problems.append(f"{name}: scaling {scaling:g} in the file, {layer.scaling:g} in the model")
    if not layers:
        problems.append(f"target_modules: no layer of the model fits {config.target_modules!r}")
    problems += [f"missing key {key}" for key in expected if key not in tensors]
    known = expected | optional
    problems += [f"unknown key {key}" for key in tensors if key not in known]
    for key, value in tensors.items():
        if key in known and tuple(value.shape) != known[key]:
            problems.append(f"{key}: expected shape {known[key]}, got {tuple(value.shape)}")
        elif key in known and not value.is_floating_point():
            problems.append(f"{key}: expected floating point numbers, got {value.dtype}")
    refuse("load_adapter", problems)
