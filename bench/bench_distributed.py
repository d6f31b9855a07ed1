"""A training step of a Llama-shaped model spread over several GPUs: what DoRA costs there beside PEFT's LoRA and DoRA.

    torchrun --nproc-per-node 2 -m bench.bench_distributed --engine fsdp2 --out fsdp2.json

Every rank has its own tokens. Each method is timed on all ranks, and on each rank alone while the others wait: the
scaling efficiency is the slowest rank's time alone over the time together. Methods take turns, there and back, since
what runs first in a process may be slower for it; times are medians over a method's steps in all turns. Random weights;
adapters in float32 on all seven linear layers of each block under bfloat16 autocast, gradient checkpointing, fused
AdamW. On a CPU, with --quick, over gloo.
"""

import argparse
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from .__main__ import facts
from .measure import failure
from .rivals import OURS

METHODS = {
    OURS: "dora_ext DoRA",
    "dora_ext_peft": "PEFT DoRA with dora_ext enabled",
    "peft_dora": "PEFT DoRA",
    "peft_lora": "PEFT LoRA",
}
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
QUICK = {
    "layers": 2, "hidden": 64, "intermediate": 160, "tokens": 64, "steps": 3, "warmup": 1, "vocab": 256, "rank": 4,
}  # fmt: skip


def base_model(args: argparse.Namespace, device: torch.device) -> nn.Module:
    """Made on the device, the same on each rank."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=args.vocab, hidden_size=args.hidden, intermediate_size=args.intermediate,
        num_hidden_layers=args.layers, num_attention_heads=max(1, args.hidden // 128),
        num_key_value_heads=max(1, args.hidden // 512), max_position_embeddings=args.tokens, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(default)
    if args.base == "nf4":
        quantise(model.model, device)
        model.is_loaded_in_4bit = True  # PEFT looks at it
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def quantise(model: nn.Module, device: torch.device) -> None:
    """Linear layers become bitsandbytes' Linear4bit: nested NF4, packed as bfloat16, so that FSDP2 shards it."""
    import bitsandbytes as bnb

    kind = {"quant_type": "nf4", "compress_statistics": True, "quant_storage": torch.bfloat16}
    for path, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear):
            sizes = linear.in_features, linear.out_features
            with torch.device("meta"):
                packed = bnb.nn.Linear4bit(*sizes, bias=False, compute_dtype=torch.bfloat16, **kind)
            weight = bnb.nn.Params4bit(linear.weight.detach(), requires_grad=False, module=packed, **kind)
            packed.weight = weight.to(device)
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, packed)


def adapted(method: str, args: argparse.Namespace, device: torch.device) -> nn.Module:
    model = base_model(args, device)
    if method == OURS:
        from dora_ext import inject

        return inject(model, LAYERS, r=args.rank, alpha=2 * args.rank)
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=args.rank, lora_alpha=2 * args.rank, target_modules=LAYERS, use_dora=method != "peft_lora", lora_dropout=0.0
    )
    return get_peft_model(model, config)


def spread(model: nn.Module, args: argparse.Namespace, device: torch.device, group) -> nn.Module:
    if args.engine == "ddp":
        return nn.parallel.DistributedDataParallel(
            model, [device] if device.type == "cuda" else None, process_group=group
        )
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    # Gradients are summed as they are, in float32; autocast chooses what is computed in.
    shard = partial(
        fully_shard, mesh=DeviceMesh.from_group(group, device.type), mp_policy=MixedPrecisionPolicy(),
        reshard_after_forward=not args.keep,
    )  # fmt: skip
    for block in list(model.modules()):
        if type(block).__name__ == "LlamaDecoderLayer":
            shard(block)
    return shard(model)


class Times:
    """Wall times of steps and the peak memory of this rank; on a CPU memory is not measured."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.seconds: list[float] = []

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def forget_peak(self) -> None:
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()

    def peak_mib(self) -> float | None:
        return torch.cuda.max_memory_allocated() / 2**20 if self.cuda else None


def measure(method: str, args: argparse.Namespace, device: torch.device, group) -> dict:
    """Times of steps and peak memory of this rank in `group`; everything is let go of before it returns."""
    switch = nullcontext()
    if method == "dora_ext_peft":
        from dora_ext.integrations.peft import enabled

        switch = enabled()
    with switch:
        model = spread(adapted(method, args, device), args, device, group)
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
        times = Times(device)
        losses = []
        for step in range(args.warmup + args.steps):
            generator = torch.Generator().manual_seed(1000 * step + dist.get_rank())
            ids = torch.randint(args.vocab, (1, args.tokens), generator=generator).to(device)
            if step == args.warmup:
                times.forget_peak()
            times.wait()
            dist.barrier(group)
            start = time.perf_counter()
            with torch.autocast(device.type, torch.bfloat16):
                loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            times.wait()
            if step >= args.warmup:
                times.seconds.append(time.perf_counter() - start)
            losses.append(loss.item())
    trained = sum(p.numel() for p in parameters)
    steps = [1e3 * seconds for seconds in times.seconds]
    return {"steps_ms": steps, "peak_mib": times.peak_mib(), "trained": trained, "losses": losses}


def attempt(method: str, args: argparse.Namespace, device: torch.device, group) -> dict:
    try:
        return measure(method, args, device, group)
    except Exception as error:
        return failure(error)
    finally:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def with_turn(before: dict | None, turn: dict) -> dict:
    """A rank's result after one more turn: all steps, their median, the largest peak, the first losses."""
    if "error" in turn or (before and "error" in before):
        return turn if "error" in turn else before
    steps = (before["steps_ms"] if before else []) + turn["steps_ms"]
    peaks = [r["peak_mib"] for r in (before, turn) if r and r["peak_mib"] is not None]
    changed = {"steps_ms": steps, "step_ms": statistics.median(steps), "peak_mib": max(peaks, default=None)}
    return (before or turn) | changed


def summary(parts: list[dict], ones: list[dict]) -> dict:
    """Of a method's results, of all ranks together and, if measured, of each alone. What they could do together is what
    the slowest of them can do alone."""
    result: dict = {"ranks": parts}
    errors = [p["error"] for p in parts if "error" in p]
    if errors:
        return result | {"error": errors[0]}
    result["step_ms"] = max(p["step_ms"] for p in parts)
    result["peak_mib"] = max((p["peak_mib"] for p in parts if p["peak_mib"] is not None), default=None)
    if ones:
        result["each_alone"] = ones
    if ones and not any("error" in one for one in ones):
        result["alone"] = max(ones, key=lambda one: one["step_ms"])
        result["efficiency"] = result["alone"]["step_ms"] / result["step_ms"]
    return result


def compare(args: argparse.Namespace, device: torch.device, note, keep: Callable[[dict], None]) -> dict[str, dict]:
    """Each method on all ranks and, if there are several, on each alone; `keep` gets what is there after each."""
    world, rank = dist.get_world_size(), dist.get_rank()
    everyone, alone = dist.new_group(), [dist.new_group([r]) for r in range(world)]
    results: dict[str, dict] = {}
    for turn in range(args.turns):
        for method in args.method if turn % 2 == 0 else reversed(args.method):
            before = results.get(method, {})
            if "error" in before:
                continue
            note(f"{method}: {world} ranks")
            mine = with_turn(before["ranks"][rank] if before else None, attempt(method, args, device, everyone))
            parts: list = [None] * world
            dist.all_gather_object(parts, mine)
            ones: list[dict] = []
            if world > 1 and not any("error" in p for p in parts):
                for r in range(world):
                    note(f"{method}: rank {r} alone")
                    one: list = [None]
                    if rank == r:
                        earlier = before["each_alone"][r] if before else None
                        one = [with_turn(earlier, attempt(method, args, device, alone[r]))]
                    dist.broadcast_object_list(one, src=r)
                    ones += one
            results[method] = summary(parts, ones)
            keep(results)
    return {method: results[method] for method in args.method}


def table(results: dict[str, dict]) -> list[str]:
    """Markdown, a row for each method."""
    lines = [
        "| | step ms | alone ms | scaling efficiency | peak MiB a rank | alone |",
        "|---|---|---|---|---|---|",
    ]
    for method, result in results.items():
        name = f"**{METHODS[method]}**" if method == OURS else METHODS[method]
        if "error" in result:
            lines.append(f"| {name} | failed | | | | |")
            continue
        one = result.get("alone", {})
        cells = [result["step_ms"], one.get("step_ms"), result.get("efficiency")]
        cells += [result["peak_mib"], one.get("peak_mib")]
        formats = ("{:.1f}", "{:.1f}", "{:.3f}", "{:.0f}", "{:.0f}")
        shown = ["" if c is None else f.format(c) for f, c in zip(formats, cells, strict=True)]
        lines.append(f"| {name} | " + " | ".join(shown) + " |")
    return lines


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.bench_distributed", description=__doc__.partition("\n")[0])
    for name, default in (("layers", 8), ("hidden", 4096), ("intermediate", 14336), ("tokens", 4096), ("steps", 6)):
        parser.add_argument(f"--{name}", type=int, default=default)
    for name, default in (("warmup", 3), ("turns", 2), ("vocab", 32000), ("rank", 16)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--method", choices=METHODS, nargs="+", default=list(METHODS))
    parser.add_argument("--engine", choices=("ddp", "fsdp2"), default="fsdp2")
    parser.add_argument("--keep", action="store_true", help="FSDP2 keeps parameters whole between forward and backward")
    parser.add_argument("--base", choices=("bf16", "nf4"), default="bf16")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help=f"sizes for a trial: {QUICK}")
    parser.add_argument("--out", type=Path, help="JSON file")
    parser.add_argument("--commit", help="what to write as the commit, where this is no git checkout")
    args = parser.parse_args(argv)
    if args.quick:
        vars(args).update(QUICK)
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    local = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local) if args.device == "cuda" else torch.device("cpu")
    if args.device == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
    first = dist.get_rank() == 0

    def note(text: str) -> None:
        if first:
            print(text, file=sys.stderr, flush=True)

    settings = {k: v for k, v in vars(args).items() if k not in ("out", "commit")}
    found = {"facts": facts(args.device, args.commit) | {"ranks": dist.get_world_size()}, "settings": settings}

    def keep(results: dict) -> None:
        # After each method: a run that is cut short keeps what it has.
        if first and args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(found | {"distributed": results}, indent=1) + "\n")

    results = compare(args, device, note, keep)
    if first:
        print(json.dumps(found["facts"] | settings))
        print("\n".join(table(results)))
        for method, result in results.items():
            if "error" in result:
                print(f"{method} failed: {result['error']}")
    dist.barrier()  # a rank that leaves while another still talks to it can bring that one down
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
