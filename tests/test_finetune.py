"""The demo from start to end, on a tiny model with random weights: as a user runs it, as a program of its own."""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import dora_ext
from dora_ext.adapter import load_adapter
from dora_ext.injection import dora_layers
from dora_ext.testing import DEVICES

pytest.importorskip("transformers")
pytest.importorskip("tqdm")
EXAMPLES = Path(__file__).parents[1] / "examples"


def start(*options) -> subprocess.Popen:
    paths = [str(Path(dora_ext.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    command = [sys.executable, str(EXAMPLES / "finetune.py"), "--model", "tiny", *map(str, options)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env)


@pytest.fixture
def finetune(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the model is too small to share, and the waiting would cost more than the work
    yield importlib.import_module("finetune")
    torch.set_num_threads(threads)


@pytest.mark.parametrize("packed", [(), ("--nf4",)], ids=["dense", "nf4"])
@pytest.mark.parametrize("device", DEVICES)
def test_trains_saves_reloads_and_merges(tmp_path, device, packed):
    pytest.importorskip("matplotlib")
    output = tmp_path / "out"
    process = start("--output", output, "--steps", 12, "--device", device, *packed)
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 0, text
    facts = json.loads((output / "metrics.json").read_text())
    assert len(facts["losses"]) == 12
    assert facts["perplexity_after"] < 0.9 * facts["perplexity_before"]
    assert facts["perplexity_reloaded"] == pytest.approx(facts["perplexity_after"], rel=5e-5)
    assert facts["perplexity_merged"] == pytest.approx(facts["perplexity_after"], rel=1e-4 if device == "cpu" else 2e-2)
    assert (output / "training.png").read_bytes().startswith(b"\x89PNG")
    assert ("packed in NF4" in text) == bool(packed)
    for word in ("perplexity before", "perplexity after", "loaded into a fresh model", "merged", "tokens/s", "loss"):
        assert word in text


def test_ctrl_c_saves_what_was_learned(tmp_path, finetune):
    process = start("--output", tmp_path, "--steps", 1_000_000, "--device", "cpu")
    seen, deadline = "", time.monotonic() + 200
    while "loss" not in seen and time.monotonic() < deadline:
        seen += process.stdout.read(1)
    process.send_signal(signal.SIGINT)
    text, _ = process.communicate(timeout=100)
    assert process.returncode == 130, seen + text
    assert "adapter saved" in text
    assert "Traceback" not in text

    fresh, _, _ = finetune.load_model("tiny", seed=0)
    load_adapter(fresh, tmp_path)
    learned = [layer.lora_B["default"].weight.abs().max() for layer in dora_layers(fresh).values()]
    assert len(learned) == 14 and all(value > 0 for value in learned)


def test_text_of_ones_own(tmp_path, finetune, capsys):
    text = tmp_path / "mine.txt"
    text.write_text("to be or not to be, that is the question. " * 60)
    options = ["--model", "tiny", "--device", "cpu", "--text", text, "--output", tmp_path / "out", "--quick"]
    pytest.importorskip("matplotlib")
    assert finetune.main([str(o) for o in [*options, "--seq-len", 32, "--rank", 2]]) == 0
    assert "on 14 layers" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options, message",
    [
        (["--text", "/no/such/file"], "No such file"),
        (["--text", __file__, "--seq-len", "100000"], "too few"),
        (["--model", "/no/such/model"], "expected a folder"),
        (["--output", __file__], "cannot write"),
    ],
)
def test_mistakes_are_told_in_a_line(tmp_path, finetune, capsys, options, message):
    always = ["--model", "tiny", "--device", "cpu", "--output", str(tmp_path), "--steps", "5"]
    assert finetune.main(always + options) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "options, message",
    [(["--nf4", "--peft"], "--nf4: packs layers"), (["--seq-len", "1"], "--seq-len: expected at least 2, got 1")],
)
def test_wrong_options_are_told_before_anything_is_read(finetune, capsys, options, message):
    with pytest.raises(SystemExit):
        finetune.main(options)
    assert message in capsys.readouterr().err


def test_a_loss_that_is_not_finite_ends_it(tmp_path, finetune, capsys, monkeypatch):
    def broken(name, seed):
        model, tokenizer, label = load_model(name, seed)
        torch.nn.init.constant_(model.lm_head.weight, float("nan"))
        return model, tokenizer, label

    load_model = finetune.load_model
    monkeypatch.setattr(finetune, "load_model", broken)
    assert finetune.main(["--model", "tiny", "--device", "cpu", "--quick", "--output", str(tmp_path)]) == 1
    assert "try a lower --lr" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_training_does_not_depend_on_the_run(tmp_path, finetune):
    pytest.importorskip("matplotlib")
    losses = []
    for name in ("a", "b"):
        folder = tmp_path / name
        options = ["--model", "tiny", "--device", "cpu", "--steps", "3", "--quick", "--output", str(folder)]
        assert finetune.main(options) == 0
        losses.append(json.loads((folder / "metrics.json").read_text())["losses"])
    assert losses[0] == losses[1]
    assert torch.tensor(losses).isfinite().all()
