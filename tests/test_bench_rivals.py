"""What the benches time computes the same layer, whoever's it is."""

from functools import partial

import pytest
import torch

pytest.importorskip("peft")
from bench import bench_decode, bench_error, bench_forward, bench_kernels, bench_nf4, inference, rivals, training_step
from bench.shapes import ConvShape, EmbeddingShape, LinearShape
from dora_ext import reference

SMALL = LinearShape(8, 16, 24, 2)
CONVS = [ConvShape(2, 4, 6, 3, (5, 4), 2), ConvShape(3, 4, 5, 3, (7,), 2), ConvShape(2, 3, 4, 3, (3, 4, 2), 2)]
EMBEDDING = EmbeddingShape(9, 7, 6, 2)  # ids come more than once


@pytest.mark.parametrize("name", ["linear", "peft_lora", "peft_dora", rivals.OURS])
def test_rivals_compute_the_same_layer(name):
    problem = rivals.Problem.random(SMALL, "cpu", torch.float64, bias=True)
    rival = rivals.build(name, problem)
    versions = [p._version for p in rival.factors]
    rival.touch()
    assert all(p._version > v for p, v in zip(rival.factors, versions, strict=True))
    assert len(rival.step()) == 1 + len(rival.trained) == {"linear": 1, "peft_lora": 3}.get(name, 4)
    if "dora" in name:
        errors = bench_error.errors_of(name, problem)
        assert set(errors) == set(bench_error.OUTPUTS)
        assert max(errors.values()) < 1e-12


@pytest.mark.parametrize("shape", [*CONVS, EMBEDDING], ids=str)
def test_rivals_of_convolutions_and_embeddings_compute_the_same_layer(shape):
    problem = rivals.Problem.random(shape, "cpu", torch.float64, bias=True)
    names = ("bare", "peft_lora", "peft_dora", rivals.OURS)
    bare, lora, theirs, ours = (rivals.build(name, problem) for name in names)
    gradients = 0 if shape is EMBEDDING else 1
    assert [len(r.wanted) for r in (bare, lora, theirs, ours)] == [gradients + n for n in (0, 2, 3, 3)]
    for rival in (lora, theirs, ours):
        assert len(rival.factors) == 2
        for got, expected in zip(rivals.factors(rival.layer), (problem.lora_A, problem.lora_B), strict=True):
            assert torch.equal(got, expected)
        versions = [p._version for p in rival.factors]
        rival.touch()
        assert all(p._version > v for p, v in zip(rival.factors, versions, strict=True))

    # LoRA is DoRA with m = n, and the bare layer that with B = 0.
    W, A, B, scaling = problem.weight, problem.lora_A, problem.lora_B, problem.scaling
    if shape is EMBEDDING:
        truth, options, norm = reference.embedding, {}, partial(reference.weight_norm, transposed=True)
    else:
        truth, options, norm = reference.conv, {"bias": problem.bias, "padding": 1}, reference.weight_norm
    zero = torch.zeros_like(B)
    magnitude = ours.layer.magnitude.detach().flatten()
    exact = {
        bare: truth(problem.x, W, A, zero, norm(W, A, zero, scaling), scaling, **options),
        lora: truth(problem.x, W, A, B, norm(W, A, B, scaling), scaling, **options),
        theirs: truth(problem.x, W, A, B, magnitude, scaling, **options),
        ours: truth(problem.x, W, A, B, magnitude, scaling, **options),
    }
    for rival, y in exact.items():
        torch.testing.assert_close(rival.forward(rival.x), y)
    assert not torch.allclose(exact[lora], exact[ours])
    for got, expected in zip(ours.step(), theirs.step(), strict=True):
        assert expected.norm() > 0
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("name", bench_nf4.NAMES)
def test_rivals_over_four_bits_compute_the_same_layer(bnb, name):
    # Rows of whole blocks: with AVX-512, bitsandbytes 0.50.2 unpacks others wrongly on a CPU.
    problem = rivals.Problem.random(LinearShape(8, 64, 24, 2), "cpu", torch.float32, bias=True)
    rival = bench_nf4.build(name, problem)
    weight = rivals.linear4bit(problem).weight
    problem.weight = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
    same = rivals.build("peft_lora" if name == "peft_qlora" else "peft_dora", problem)
    for ours, expected in zip(rival.step(), same.step(), strict=True):
        assert (ours - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("packed", [False, True], ids=["dense", "NF4"])
@pytest.mark.parametrize("name", bench_decode.NAMES)
def test_inference_is_the_same_with_the_norm_at_hand(bnb, name, packed):
    # With AVX-512, bitsandbytes' forward takes output features in 32s on a CPU.
    problem = rivals.Problem.random(LinearShape(1, 64, 32, 2), "cpu", torch.float32, bias=True)
    call, at_hand = inference.build(name, problem, packed)
    y = at_hand()
    y = y[0] if isinstance(y, tuple) else y
    torch.testing.assert_close(call(), y, rtol=1e-5, atol=1e-5)


def test_inference_of_many_tokens_is_that_of_the_trained_layers():
    problem = rivals.Problem.random(SMALL, "cpu", torch.float64, bias=True)
    for name in set(bench_forward.NAMES) - {rivals.COMPILED}:
        training = rivals.build("peft_dora" if name == rivals.OURS else name, problem)
        for call in inference.build(name, problem):
            torch.testing.assert_close(call(), training.forward(training.x))


def test_pefts_column_norm_is_ours():
    weight, lora_A, lora_B = torch.randn(12, 6), torch.randn(2, 12), torch.randn(6, 2)
    theirs = bench_kernels.peft_embedding_norm(weight, lora_A, lora_B)()
    norm, _ = torch.ops.dora_ext.norm(weight, lora_A, lora_B, torch.ones(6), 2.0, True)
    torch.testing.assert_close(theirs, norm)


@pytest.mark.cuda
@pytest.mark.parametrize("shape", [*CONVS, EMBEDDING, SMALL], ids=str)
def test_our_step_can_be_captured(shape):
    (result,) = training_step.on_cuda(shape, [rivals.OURS], quick=True).values()
    assert set(result) == {"wall_ms", "peak_mib", "device_ms"}
