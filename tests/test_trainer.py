"""transformers' Trainer on DoRA models: the losses are those of PEFT's DoRA, whatever the Trainer is asked to do."""

import functools
import math
import statistics
import sys
import tempfile
import time

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("peft")

from trainer_cases import OURS, arguments, base_model, dora_model, kernels_for, losses, peft_model, sequences
from transformers import PrinterCallback, Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainingArguments, set_seed

from dora_ext import inject
from dora_ext.analysis import MagnitudeHistory, analyse
from dora_ext.injection import dora_layers
from dora_ext.integrations.transformers import DoraCallback


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the models are too small to share
    yield
    torch.set_num_threads(threads)


def train(
    flavour: str, folder, *, resume=None, callbacks=(), prepare=lambda model: None, count=8, **options
) -> Trainer:
    with kernels_for(flavour):
        set_seed(11)
        model = dora_model(flavour)
        prepare(model)
        args = arguments(TrainingArguments, folder, **options)
        trainer = Trainer(model=model, args=args, train_dataset=sequences(count), callbacks=list(callbacks))
        trainer.remove_callback(PrinterCallback)
        trainer.train(resume_from_checkpoint=resume)
    return trainer


def assert_same_losses(ours: list[float], theirs: list[float], tolerance: float) -> None:
    """The mean over the steps of the relative difference."""
    assert len(ours) == len(theirs) > 0 and all(map(math.isfinite, ours))
    error = statistics.fmean(abs(a - b) / abs(b) for a, b in zip(ours, theirs, strict=True))
    assert error <= tolerance, f"losses differ by {error:.3g} on average, allowed {tolerance:.3g}: {ours}, {theirs}"


def takes_gradients(model) -> None:
    """Reentrant checkpoints pass gradients on only if a block's input asks for one, and the embedding is frozen."""
    model.enable_input_require_grads()


CHECKPOINTING = {"gradient_checkpointing": True}
OPTIONS = {
    "plain": {},
    "accumulation": {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 2},
    "checkpointing": CHECKPOINTING | {"gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "reentrant checkpointing": CHECKPOINTING
    | {"gradient_checkpointing_kwargs": {"use_reentrant": True}, "prepare": takes_gradients},
    "bf16 autocast": {"bf16": True},
    "bf16 autocast, checkpointing, accumulation": CHECKPOINTING
    | {"bf16": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}, "gradient_accumulation_steps": 2},
    "clipping and weight decay": {"max_grad_norm": 0.1, "weight_decay": 0.1},
    "adafactor": {"optim": "adafactor"},
}


LONG = {"max_steps": 60, "learning_rate": 1e-3, "count": 64}
OPTIONS |= {"60 steps": LONG, "60 steps in bf16 autocast": LONG | {"bf16": True}}


@functools.cache
def pefts_losses(name: str) -> list[float]:
    with tempfile.TemporaryDirectory() as folder:
        return losses(train("peft", folder, **OPTIONS[name]))


@pytest.mark.parametrize("flavour", OURS)
@pytest.mark.parametrize("name", OPTIONS)
def test_losses_are_pefts(tmp_path, name, flavour):
    ours = losses(train(flavour, tmp_path, **OPTIONS[name]))
    assert statistics.fmean(ours[-3:]) < 0.95 * statistics.fmean(ours[:3])
    assert_same_losses(ours, pefts_losses(name), 1e-3 if "bf16" in name else 1e-5)


@pytest.mark.cuda
@pytest.mark.parametrize("flavour", OURS)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_losses_are_pefts_on_a_gpu(tmp_path, dtype, flavour):
    # The steps of the long runs: at the short runs' learning rate half precision's rounding alone, PEFT's as well as
    # ours, moves the losses by more than what is allowed here.
    options = LONG | {"use_cpu": False, dtype: True}
    ours, theirs = (losses(train(f, tmp_path, **options)) for f in (flavour, "peft"))
    assert_same_losses(ours, theirs, 1e-3)


@pytest.mark.parametrize("reentrant", [False, True])
def test_one_norm_for_each_layer_and_step(tmp_path, reentrant):
    """Neither accumulation nor recomputation computes a norm again."""
    trainer = train(
        "dora_ext", tmp_path, max_steps=3, gradient_accumulation_steps=8, per_device_train_batch_size=1,
        gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": reentrant},
        prepare=takes_gradients,
    )  # fmt: skip
    assert [layer.norm_cache.computed for layer in dora_layers(trainer.model).values()] == [3] * 8


@pytest.mark.parametrize("flavour", OURS)
def test_resumed_run_goes_on_as_if_uninterrupted(tmp_path, flavour):
    options = {"save_strategy": "steps", "save_steps": 3, "lr_scheduler_type": "linear"}
    whole = train(flavour, tmp_path / "whole", **options)
    resumed = train(flavour, tmp_path / "again", resume=str(tmp_path / "whole" / "checkpoint-3"), **options)
    assert losses(resumed) == losses(whole)
    for (name, a), b in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("flavour", OURS)
def test_sequence_to_sequence(tmp_path, flavour):
    def run(flavour):
        with kernels_for(flavour):
            set_seed(11)
            model, data = dora_model(flavour, "t5"), sequences()
            args = arguments(Seq2SeqTrainingArguments, tmp_path)
            trainer = Seq2SeqTrainer(model=model, args=args, train_dataset=data, eval_dataset=data)
            trainer.train()
            # PEFT 0.21's own generate lags behind transformers.
            plain = model if flavour == "dora_ext" else model.get_base_model()
            ids = torch.stack([entry["input_ids"] for entry in data])
            return losses(trainer), trainer.evaluate()["eval_loss"], plain.generate(ids, max_new_tokens=6)

    (ours, held_out, tokens), (theirs, expected, expected_tokens) = run(flavour), run("peft")
    assert ours[-1] < ours[0]
    assert_same_losses(ours, theirs, 1e-5)
    assert held_out == pytest.approx(expected, rel=1e-5)
    assert torch.equal(tokens, expected_tokens) and tokens.shape == (8, 7)


@pytest.mark.parametrize("flavour", OURS)
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_torch_compile(tmp_path, backend, flavour):
    torch._dynamo.reset()
    compiled = losses(train(flavour, tmp_path, torch_compile=True, torch_compile_backend=backend, max_steps=3))
    theirs = losses(train("peft", tmp_path, max_steps=3))
    torch._dynamo.reset()
    assert_same_losses(compiled, theirs, 1e-5)


@pytest.mark.parametrize("flavour", [*OURS, "peft"])
def test_callback_records_while_it_trains(tmp_path, flavour):
    callback = DoraCallback(every=2)
    trainer = train(flavour, tmp_path, callbacks=[callback], max_steps=5)
    history = callback.history
    assert history.steps == [0, 2, 4]
    name = "model.layers.1.mlp.down_proj"
    gradients = history.curve(name, "magnitude_grad_norm")
    assert gradients[0] is None and min(gradients[1:]) > 0
    assert len(set(history.curve(name, "direction_change"))) == 3
    # Recorded after the step, so that the last record of all is what the trained model shows.
    last = DoraCallback(every=5)
    trainer = train(flavour, tmp_path, callbacks=[last], max_steps=5)
    final = analyse(trainer.model)[name].scalars()
    assert {k: v for k, v in last.history.layers[-1][name].scalars().items() if k in final} == final
    assert losses(trainer) == losses(train(flavour, tmp_path, max_steps=5))  # being watched changes nothing


class Writer:
    """What the callback needs of a SummaryWriter."""

    def __init__(self):
        self.scalars = {}

    def add_scalar(self, name, value, step):
        self.scalars[name, step] = value


def test_callback_writes_where_it_is_told(tmp_path, monkeypatch):
    for name in ("tensorboard", "torch.utils.tensorboard", "tensorboardX"):
        monkeypatch.setitem(sys.modules, name, None)
    writer, logged = Writer(), []
    callback = DoraCallback(every=3, writer=writer, log=logged.append)
    train("dora_ext", tmp_path, callbacks=[callback])
    assert {step for _, step in writer.scalars} == {0, 3, 6}
    layers = callback.history.layers[1]
    change = statistics.fmean(a.direction_change for name, a in layers.items() if name.endswith("q_proj"))
    assert writer.scalars["dora/q_proj/direction_change", 3] == pytest.approx(change)
    assert logged[1]["dora/q_proj/direction_change"] == pytest.approx(change)
    assert ("dora/q_proj/magnitude_grad_norm", 0) not in writer.scalars


def events(folder) -> dict[int, float]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    (tag,) = (tag for tag in accumulator.Tags()["scalars"] if tag.endswith("dora/v_proj/magnitude/mean"))
    return {event.step: event.value for event in accumulator.Scalars(tag)}


def test_callback_reaches_tensorboard_through_the_trainer(tmp_path):
    pytest.importorskip("tensorboard")
    args = arguments(TrainingArguments, tmp_path, report_to=["tensorboard"])
    trainer = Trainer(model=dora_model("dora_ext"), args=args, train_dataset=sequences())
    callback = DoraCallback(every=3, log=trainer.log)
    trainer.add_callback(callback)
    trainer.train()
    (run,) = (tmp_path / "runs").iterdir()
    assert list(events(run)) == [0, 3, 6]
    logged = [e for e in trainer.state.log_history if "dora/v_proj/magnitude/mean" in e]
    assert [e["step"] for e in logged] == [0, 3, 6]
    assert events(run)[6] == pytest.approx(logged[-1]["dora/v_proj/magnitude/mean"])


def test_callback_reaches_tensorboard_by_itself(tmp_path):
    pytest.importorskip("tensorboard")
    callback = DoraCallback(every=3)
    train("dora_ext", tmp_path, callbacks=[callback], report_to=["tensorboard"])
    (run,) = (tmp_path / "runs").glob("*-dora")
    values = [layer.magnitude.mean for name, layer in callback.history.layers[-1].items() if "v_proj" in name]
    assert events(run)[6] == pytest.approx(statistics.fmean(values))


def test_history_goes_on_in_a_resumed_run(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 4}
    first = DoraCallback(every=2)
    train("dora_ext", tmp_path / "a", callbacks=[first], **options)
    first.history.to_json(tmp_path / "history.json")
    writer = Writer()
    again = DoraCallback(every=2, writer=writer, history=MagnitudeHistory.from_json(tmp_path / "history.json"))
    checkpoint = str(tmp_path / "a" / "checkpoint-4")
    train("dora_ext", tmp_path / "b", resume=checkpoint, callbacks=[again], **options)
    assert again.history.steps == [0, 2, 4, 6]
    assert again.history.layers == first.history.layers
    assert {step for _, step in writer.scalars} == {6}
    train("dora_ext", tmp_path / "c", callbacks=[again], max_steps=1)  # a new run, not a resumed one
    assert again.history.steps == [0]


@pytest.mark.parametrize("every", [0, -1, 2.5, "10"])
def test_callback_refuses_other_intervals(every):
    with pytest.raises(ValueError, match="every: expected a whole number of steps"):
        DoraCallback(every=every)


def test_callback_names_a_model_without_dora(tmp_path):
    args = arguments(TrainingArguments, tmp_path)
    trainer = Trainer(model=base_model(), args=args, train_dataset=sequences(), callbacks=[DoraCallback()])
    with pytest.raises(ValueError, match="LlamaForCausalLM has no layer with an active DoRA adapter"):
        trainer.train()


def test_recording_every_hundred_steps_costs_under_one_percent():
    """Some 0.1 % on a quiet machine; the least of several times, because a busy machine only ever adds."""
    model = inject(base_model(hidden=128))
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    history, ids = MagnitudeHistory(), torch.randint(32, (8, 128))

    def step():
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    def least(action) -> float:
        seconds = []
        for _ in range(6):
            start = time.perf_counter()
            action()
            seconds.append(time.perf_counter() - start)
        return min(seconds[1:])

    record, hundred = least(lambda: history.record(model, 0)), 100 * least(step)
    assert record < 0.01 * hundred, f"{1e3 * record:.1f} ms for a record, {1e3 * hundred:.0f} ms for 100 steps"


def test_trainable_parameters_are_pefts():
    counts = {}
    for flavour in ("dora_ext", "peft"):
        model = dora_model(flavour)
        counts[flavour] = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert counts["dora_ext"] == counts["peft"]
    lora = peft_model(use_dora=False)
    layers = dora_layers(dora_model("dora_ext")).values()
    extra = sum(layer.magnitude.numel() for layer in layers)
    assert counts["peft"] == extra + sum(p.numel() for p in lora.parameters() if p.requires_grad)
