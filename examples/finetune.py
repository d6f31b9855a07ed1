"""Fine-tune a language model with DoRA, from start to end: train, save, load into a fresh model, merge.

python examples/finetune.py                              SmolLM2-135M on Python's documentation
python examples/finetune.py --model PATH --text FILE...  your model, your text
python examples/finetune.py --model random               no files needed
"""

import argparse
import copy
import json
import math
import signal
import statistics
import sys
import time
from pathlib import Path

import torch
from finetune_parts import RANDOM_MODELS, DemoError, OurDora, PeftDora, cut, draw, load_model, magnitudes, read_text
from torch import Tensor, nn
from tqdm import tqdm

INTERRUPTED = 130  # what a shell reports after Ctrl-C


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="smollm2", help=f"smollm2, a folder or .gguf file, or {', '.join(RANDOM_MODELS)}")
    add("--text", type=Path, nargs="+", help="UTF-8 files to learn from (default: pydoc's topics)")
    add("--output", type=Path, default=Path("demo-output"), help="folder for the adapter and the picture")
    add("--steps", type=int, help="training steps (default 30, quick 4)")
    add("--batch", type=int, default=4, help="sequences a step")
    add("--seq-len", type=int, default=128, help="tokens a sequence")
    add("--rank", type=int, default=8)
    add("--alpha", type=float, default=16.0)
    add("--lr", type=float, default=1e-3)
    add("--seed", type=int, default=0)
    add("--device", help="cpu, cuda, ... (default: the GPU where there is one)")
    add("--nf4", action="store_true", help="pack the model's linear layers into 4 bits first (QDoRA)")
    add("--peft", action="store_true", help="the same through PEFT's DoRA, to compare with")
    add("--quick", action="store_true", help="a few steps, to see that it works")
    args = parser.parse_args(argv)
    args.steps = args.steps if args.steps is not None else (4 if args.quick else 30)
    for name, low in (("steps", 1), ("batch", 1), ("seq_len", 2), ("rank", 1)):
        if getattr(args, name) < low:
            parser.error(f"--{name.replace('_', '-')}: expected at least {low}, got {getattr(args, name)}")
    if args.nf4 and args.peft:
        parser.error("--nf4: packs layers of dora_ext's own, which PEFT does not know; leave out --peft")
    return args


def prepare_output(folder: Path) -> None:
    """Now, not after minutes of training, is the time to find out that nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".write-test"
        probe.write_bytes(b"")
        probe.unlink()
    except OSError as error:
        raise DemoError(f"--output {folder}: cannot write there: {error}") from error


def has_bfloat16(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def autocast(device: torch.device):
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=has_bfloat16(device))


@torch.no_grad()
def perplexity(model: nn.Module, blocks: Tensor, batch: int, device: torch.device) -> float:
    model.eval()
    total = 0.0
    for part in blocks.split(batch):
        part = part.to(device)
        with autocast(device):
            total += model(input_ids=part, labels=part).loss.item() * len(part)
    return math.exp(total / len(blocks))


def batches(blocks: Tensor, size: int, seed: int):
    """Endless batches of blocks, in a new random order each time all have been seen."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.long)
    while True:
        while len(order) < size:
            order = torch.cat([order, torch.randperm(len(blocks), generator=generator)])
        yield blocks[order[:size]]
        order = order[size:]


def train(model: nn.Module, blocks: Tensor, args: argparse.Namespace, device: torch.device):
    """Losses, seconds of each step, and whether Ctrl-C ended it (after the step under way)."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.0)
    warmup = max(1, args.steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (args.steps - step) / max(1, args.steps - warmup))
    )
    losses, seconds, stopped = [], [], False

    def stop(*_):
        nonlocal stopped
        stopped = True
        signal.signal(signal.SIGINT, usual)  # a second Ctrl-C does not wait for the step
        bar.write("Ctrl-C: ending after this step, then saving")

    source = batches(blocks, args.batch, args.seed)
    model.train()
    with tqdm(total=args.steps, desc="training", unit="step", dynamic_ncols=True) as bar:
        usual = signal.signal(signal.SIGINT, stop)
        try:
            while len(losses) < args.steps and not stopped:
                start = time.perf_counter()
                batch = next(source).to(device)
                with autocast(device):
                    loss = model(input_ids=batch, labels=batch).loss
                loss.backward()
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                schedule.step()
                losses.append(loss.item())  # waits for the device
                seconds.append(time.perf_counter() - start)
                if not math.isfinite(losses[-1]):
                    raise DemoError(f"the loss is {losses[-1]} at step {len(losses)}: try a lower --lr")
                rate = args.batch * args.seq_len / statistics.median(seconds[-10:])
                bar.set_postfix_str(f"loss {losses[-1]:.3f}, {rate:,.0f} tokens/s")
                bar.update()
        finally:
            signal.signal(signal.SIGINT, usual)
    return losses, seconds, stopped


def same(a: float, b: float, relative: float) -> str:
    if not math.isclose(a, b, rel_tol=relative):
        raise DemoError(f"perplexity {b:.6g}, expected {a:.6g} (relative difference up to {relative:g})")
    return f"{b:.4g}"


def run(args: argparse.Namespace) -> int:
    begin = time.perf_counter()
    prepare_output(args.output)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = torch.bfloat16 if has_bfloat16(device) else torch.float32
    dora = PeftDora() if args.peft else OurDora()

    model, tokenizer, base_name = load_model(args.model, args.seed)
    learn, held_out = cut(tokenizer.encode(read_text(args.text)), args.seq_len)
    # Spread over the held-out part, and few enough that measuring takes less time than training.
    held_out = held_out[:: math.ceil(len(held_out) / (4 if args.quick else 32))]
    model.to(dtype).config.use_cache = False
    if args.nf4:
        dora.pack(model)
    fresh = copy.deepcopy(model)  # untouched base weights, to load the adapter into later
    loading = time.perf_counter() - begin
    kept = f"{str(dtype).removeprefix('torch.')}{', packed in NF4' if args.nf4 else ''}"
    print(f"{base_name} on {device}, {kept}, read in {loading:.0f} s; "
          f"{learn.numel():,} tokens to learn from, {held_out.numel():,} held out")  # fmt: skip

    torch.manual_seed(args.seed)
    model = dora.wrap(model.to(device), args.rank, args.alpha)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    start_m = magnitudes(model)
    print(f"DoRA through {dora.name} on {len(start_m)} layers: {trained:,} numbers to train")
    before = perplexity(model, held_out, args.batch, device)
    print(f"held-out perplexity before: {before:.4g}")

    losses, seconds, stopped = train(model, learn, args, device)
    if losses:
        # Saved before anything else is tried with it.
        dora.save(model, args.output, base_name)
        print(f"{len(losses)} steps, {statistics.median(seconds):.2f} s each; adapter saved in {args.output}")
    if stopped:
        return INTERRUPTED

    after = perplexity(model, held_out, args.batch, device)
    print(f"held-out perplexity after:  {after:.4g}")
    end_m = magnitudes(model)
    moved = {n: ((end_m[n] - m).abs() / m.clamp_min(1e-12)).mean().item() for n, m in start_m.items()}
    del model
    fresh = dora.load(fresh.to(device), args.output)
    reloaded = perplexity(fresh, held_out, args.batch, device)
    print(f"loaded into a fresh model:  {same(after, reloaded, 5e-5)}")
    fresh = dora.merge(fresh)
    merged = perplexity(fresh, held_out, args.batch, device)
    print(f"merged into its weights:    {same(after, merged, 1e-4 if dtype == torch.float32 else 2e-2)}")

    picture = args.output / "training.png"
    draw(picture, losses, before, after, moved, f"{base_name}: DoRA r {args.rank} through {dora.name}")
    total = time.perf_counter() - begin
    facts = {
        "through": dora.name, "device": str(device), "steps": len(losses), "losses": losses, "step_seconds": seconds,
        "perplexity_before": before, "perplexity_after": after, "perplexity_reloaded": reloaded,
        "perplexity_merged": merged, "loading_seconds": loading, "total_seconds": total,
    }  # fmt: skip
    (args.output / "metrics.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(f"picture: {picture}; {total:.0f} s in all")
    return 0


def main(argv: list[str] | None = None) -> int:
    args = arguments(argv)
    try:
        return run(args)
    except DemoError as error:
        print(f"finetune: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("finetune: stopped", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)  # in step with the progress bar, into a file too
    sys.exit(main())
