"""Floors: counted by hand for a shape of each bench, and what a plot divides by."""

import pytest

pytest.importorskip("peft")
from bench import __main__ as program
from bench import (
    bench_conv,
    bench_decode,
    bench_embedding,
    bench_forward,
    bench_kernels,
    bench_linear,
    bench_nf4,
    plot,
)
from bench.measure import floor_ms
from bench.rivals import OURS
from bench.shapes import ConvShape, EmbeddingShape, LinearShape

LINEAR = vars(LinearShape(1000, 2000, 500, 16))


@pytest.mark.parametrize(
    ("bench", "row", "operations", "moved"),
    [
        # Two products of 2 · 1000 · 2000 · 500; x and dX of 2 million, y and dY of half a million, W of one million.
        (bench_linear, LINEAR, 4e9, 2 * (2 * 2e6 + 2 * 0.5e6 + 1e6)),
        (bench_nf4, LINEAR, 4e9, 2 * (2 * 2e6 + 2 * 0.5e6) + 0.5e6 + 1e6 / 64 + 4e6 / (64 * 256)),
        # A and B have 16 · 2500 numbers.
        (bench_forward, LINEAR, 2e9, 2 * (2e6 + 0.5e6 + 1e6 + 40e3)),
        (bench_decode, LINEAR | {"weights": "dense"}, 2e9, 2 * (2e6 + 0.5e6 + 1e6 + 40e3)),
        (bench_decode, LINEAR | {"weights": "NF4"}, 2e9, 2 * (2.5e6 + 40e3) + 515625 + 4e6 / (64 * 256)),
        # 2 images of 5 × 10, 3 channels become 4: 100 places, each with 9 · 3 · 4 multiplications in each product.
        (bench_conv, vars(ConvShape(2, 3, 4, 3, (5, 10), 1)), 2 * 2 * 100 * 108, 2 * (2 * 300 + 2 * 400 + 108)),
        # W of 1000 × 20, A and dA of 4 × 1000, y and dY of 30 × 20.
        (bench_embedding, vars(EmbeddingShape(30, 1000, 20, 4)), 0, 2 * (20000 + 2 * 4000 + 2 * 600)),
    ],
)
def test_what_is_counted(bench, row, operations, moved):
    assert bench.work(row) == (operations, pytest.approx(moved))


def test_a_floor_is_the_longer_of_operations_and_bytes():
    ceilings = {"gemm_tflops": 100, "copy_tb_s": 2}
    assert floor_ms(4e9, 12e6, ceilings) == pytest.approx(0.04)
    assert floor_ms(4e9, 12e8, ceilings) == pytest.approx(0.6)
    results = {bench_linear.KEY: [dict(LINEAR)], "ceilings": ceilings}
    program.add_floors(bench_linear, results)
    assert results[bench_linear.KEY] == [LINEAR | {"floor_ms": pytest.approx(0.04)}]


def test_rows_without_measured_rates_have_no_floor():
    results = {bench_linear.KEY: [dict(LINEAR)]}
    program.add_floors(bench_linear, results)
    assert results == {bench_linear.KEY: [LINEAR]}


def test_plots_divide_by_the_floor_or_else_by_the_frozen_layer():
    rivals = {"linear": {"device_ms": 2.0, "wall_ms": 9.0}, "peft_dora": {"error": "", "wall_ms": 9.0}}
    row = {"rivals": rivals | {OURS: {"device_ms": 3.0, "wall_ms": 9.0}}}
    assert plot.ratios(row | {"floor_ms": 1.5}, bench_linear.NAMES) == ("the floor", {"linear": 4 / 3, OURS: 2})
    assert plot.ratios(row, bench_linear.NAMES) == ("frozen linear", {"linear": 1, OURS: 1.5})
    on_cpu = {"rivals": {"linear": {"wall_ms": 2.0}, OURS: {"wall_ms": 5.0}}}
    assert plot.ratios(on_cpu, bench_linear.NAMES) == ("frozen linear", {"linear": 1, OURS: 2.5})
    kernel = {"rivals": {"norm": {"us": 6.0, "copy_us": 4.0}}}
    assert plot.ratios(kernel, bench_kernels.NAMES) == ("the floor", {"norm": 1.5})


@pytest.mark.parametrize(
    ("missing", "reason"), [("matplotlib is missing", "matplotlib is missing"), (None, "only with --out")]
)
def test_what_cannot_be_drawn_is_not_measured_first(monkeypatch, capsys, missing, reason):
    monkeypatch.setattr(plot, "MISSING", missing)
    monkeypatch.setattr(program, "facts", None)  # would fail if it got so far
    with pytest.raises(SystemExit):
        program.main(["linear", "--device", "cpu", "--quick", "--plot"])
    assert reason in capsys.readouterr().err
