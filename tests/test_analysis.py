"""dora_ext.analysis against the definitions, computed the long way in float64 from the effective weight."""

import copy
import math
import sys
from collections import OrderedDict

import pytest
import torch
from module_cases import ALL_BASES, BASES, make_base, make_layer, peft_layer, train_a_little
from torch import Tensor, nn

from dora_ext import DoraLinear, inject, reference
from dora_ext.analysis import LayerAnalysis, MagnitudeHistory, Spread, analyse, by_kind, summary
from dora_ext.nn.base_weight import dense_weight
from dora_ext.testing import DEVICES

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def truth(layer: nn.Module, adapter: str = "default") -> dict[str, float]:
    """The numbers of one layer by the paper's formulas, everything formed in float64."""
    embedding = "lora_embedding_A" in dict(layer.named_children()) and adapter in layer.lora_embedding_A
    if embedding:
        A, B = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
    else:
        A, B = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    W, A, B = (t.detach().double().cpu() for t in (dense_weight(layer.base_layer), A, B))
    m = layer.lora_magnitude_vector[adapter].weight
    scaling = layer.scaling if isinstance(layer.scaling, float) else layer.scaling[adapter]
    if embedding or getattr(layer, "fan_in_fan_out", False):
        W = W.T
    if W.dim() > 2:
        W, V = (reference.effective_conv_weight(W, A, b, scaling).flatten(1) for b in (torch.zeros_like(B), B))
    else:
        V = W + scaling * B @ A
    gradient = None if m.grad is None else m.grad.double().norm().item()
    return numbers(W, V, m.detach().double().cpu().flatten(), gradient)


def numbers(W: Tensor, V: Tensor, m: Tensor, gradient: float | None) -> dict[str, float]:
    n, m_0 = V.norm(dim=1), W.norm(dim=1)
    expected = {}
    for name, t in (("magnitude", m), ("norm", n), ("ratio", m / n)):
        for part, value in (("mean", t.mean()), ("std", t.std(correction=0)), ("min", t.min()), ("max", t.max())):
            expected[f"{name}/{part}"] = value.item()
    expected["magnitude_change"] = (m - m_0).abs().mean().item()
    expected["relative_magnitude_change"] = ((m - m_0).abs() / m_0).mean().item()
    # |u - v|^2 / 2 of unit vectors is 1 - cos, and keeps its digits where the vectors are nearly the same.
    expected["direction_change"] = ((V / n[:, None] - W / m_0[:, None]).norm(dim=1) ** 2 / 2).mean().item()
    return expected if gradient is None else expected | {"magnitude_grad_norm": gradient}


def check(analysis: LayerAnalysis, expected: dict[str, float], tolerance: float) -> None:
    got = analysis.scalars()
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name] == pytest.approx(value, rel=tolerance), name


def with_gradient(layer: nn.Module) -> nn.Module:
    m = layer.lora_magnitude_vector["default"].weight
    m.grad = torch.randn_like(m)
    return layer


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("name", ALL_BASES)
def test_our_layers(name, dtype, device):
    layer = with_gradient(make_layer(name, dtype, device))
    (analysis,) = analyse(nn.ModuleDict({"layer": layer})).values()
    check(analysis, truth(layer), TOLERANCE[dtype])


@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_adapters_of_another_dtype_than_the_weight(dtype, adapter_dtype):
    layer = make_layer("linear", dtype, adapter_dtype=adapter_dtype)
    (analysis,) = analyse(layer).values()
    check(analysis, truth(layer), TOLERANCE[dtype])


@pytest.mark.parametrize("name", BASES)
def test_peft_layers(name):
    layer = with_gradient(peft_layer(make_base(name)))
    (analysis,) = analyse(nn.ModuleDict({"layer": layer})).values()
    check(analysis, truth(layer), TOLERANCE[torch.float32])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [1e-2, 1e-5, 1e-9])
def test_small_changes_of_direction_keep_their_digits(size, dtype):
    """1 - cos of nearly parallel vectors, taken at its word, is noise below 1e-7 in float32."""
    layer = DoraLinear(300, 40, r=4, dtype=dtype)
    with torch.no_grad():
        layer.lora_B["default"].weight.normal_().mul_(size)
    (analysis,) = analyse(layer).values()
    expected = truth(layer)["direction_change"]
    assert 0 < expected < 1e2 * size**2
    assert analysis.direction_change == pytest.approx(expected, rel=2e-3 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("flip", [-0.5, -3.0])
def test_directions_that_turn_round(flip):
    layer = DoraLinear(6, 6, r=6, alpha=6, dtype=torch.float64)
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(torch.eye(6))
        layer.lora_B["default"].weight.copy_(flip * layer.base_layer.weight)
    (analysis,) = analyse(layer).values()
    assert analysis.direction_change == pytest.approx(0.0 if flip > -1 else 2.0, abs=1e-12)
    assert analysis.norm.mean == pytest.approx(abs(1 + flip) * analysis.magnitude.mean)


@pytest.mark.parametrize("name", BASES)
def test_untrained_layers_have_not_changed_at_all(name):
    layer = make_base(name, torch.bfloat16)
    layer = inject(nn.ModuleDict({"layer": layer}), ["layer"])
    (analysis,) = analyse(layer).values()
    assert (analysis.magnitude_change, analysis.direction_change) == (0, 0)
    assert (analysis.ratio, analysis.magnitude_grad_norm) == (Spread(1, 0, 1, 1), None)


def test_features_without_weights_count_as_unchanged():
    base = nn.Linear(5, 4)
    with torch.no_grad():
        base.weight[1] = 0
    layer = train_a_little(DoraLinear.from_base(base, r=2))
    with torch.no_grad():
        layer.lora_B["default"].weight[1] = 0
    (analysis,) = analyse(layer).values()
    kept = [0, 2, 3]
    W = base.weight.double()[kept]
    V = W + layer.scaling * (layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double())[kept]
    expected = numbers(W, V, layer.magnitude.detach().double()[kept], None)
    for name in ("magnitude_change", "relative_magnitude_change", "direction_change"):
        # The zero row's m is 0 and stays 0.
        assert getattr(analysis, name) == pytest.approx(expected[name] * 3 / 4, rel=1e-5)
    assert analysis.ratio.min == 0


def test_quantised_base():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    base = bitsandbytes.nn.Linear4bit(64, 32, quant_type="nf4", compute_dtype=torch.float32)
    base.weight.data = torch.randn(32, 64) / 8
    base = base.to("cpu")
    ours, theirs = train_a_little(DoraLinear.from_base(base, r=4)), peft_layer(base)
    for layer in (ours, theirs):
        (analysis,) = analyse(nn.ModuleDict({"layer": layer})).values()
        check(analysis, truth(layer), 2e-5)


def chain(**layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(layers))


def peft_model(model: nn.Module, **options):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(**{"r": 2, "use_dora": True, "target_modules": ["a", "b"], **options})
    return peft.get_peft_model(model, config)


def test_peft_and_dora_ext_agree_and_name_layers_alike():
    plain = chain(a=nn.Linear(8, 6), b=nn.Linear(6, 5))
    theirs = train_a_little(peft_model(copy.deepcopy(plain), lora_alpha=4))
    ours = inject(plain, ["a", "b"], r=2, alpha=4)
    values = {k.removeprefix("base_model.model."): v for k, v in theirs.state_dict().items()}
    ours.load_state_dict(values)
    expected, got = analyse(theirs), analyse(ours)
    assert list(got) == list(expected) == ["a", "b"]
    assert got == expected  # the same kernel on the same values
    assert list(analyse(torch.compile(ours))) == ["a", "b"]


def test_which_adapter():
    model = peft_model(chain(a=nn.Linear(8, 6), b=nn.Linear(6, 5)))
    peft = sys.modules["peft"]
    model.add_adapter("other", peft.LoraConfig(r=3, use_dora=True, target_modules=["b"]))
    model.add_adapter("plain", peft.LoraConfig(r=3, target_modules=["a", "b"]))
    train_a_little(model)
    layer = model.base_model.model.b
    assert list(analyse(model)) == ["a", "b"]
    check(analyse(model, "other")["b"], truth(layer, "other"), 2e-5)
    model.set_adapter("other")
    assert list(analyse(model)) == ["b"]
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ValueError, match=r"b: several DoRA adapters are active, name one: default, other"):
        analyse(model)
    check(analyse(model, "default")["b"], truth(layer), 2e-5)
    model.base_model.set_adapter("plain")
    with pytest.raises(ValueError, match="no layer with an active DoRA adapter"):
        analyse(model)


def test_errors_say_what_is_missing():
    with pytest.raises(ValueError, match="Linear has no layer with an active DoRA adapter"):
        analyse(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="no layer with a DoRA adapter 'mine'"):
        analyse(DoraLinear(3, 3, r=1), "mine")
    model = peft_model(chain(a=nn.Linear(8, 6), b=nn.Linear(6, 5)))
    before = analyse(model)
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"a is merged.*unmerge_adapter"):
        analyse(model)
    model.unmerge_adapter()
    assert analyse(model)["a"].norm.mean == pytest.approx(before["a"].norm.mean)


def test_a_merged_layer_of_ours_still_has_its_base_weight():
    layer = make_layer("linear")
    before = analyse(layer)
    layer.merge()
    assert analyse(layer) == before


def test_nothing_changes_and_autocast_has_no_say():
    layer = make_layer("linear")
    state = {k: v.clone() for k, v in layer.state_dict().items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        check(analyse(layer)[""], truth(layer), 2e-5)
    assert all(torch.equal(v, state[k]) for k, v in layer.state_dict().items())
    assert not any(p.grad is not None for p in layer.parameters())


def test_kinds_and_summary():
    blocks = nn.ModuleList(chain(up=nn.Linear(4, 6), down=nn.Linear(6, 4)) for _ in range(3))
    model = nn.ModuleDict({"blocks": blocks, "tail": nn.Sequential(nn.Conv1d(4, 2, 1))})
    model = train_a_little(inject(model, r".*(up|down|tail\.0)", r=2))
    layers = analyse(model)
    kinds = by_kind(layers)
    assert list(kinds) == ["up", "down", "Conv1d"]
    ups = [layers[f"blocks.{i}.up"] for i in range(3)]
    assert kinds["up"].direction_change == pytest.approx(sum(u.direction_change for u in ups) / 3)
    assert kinds["up"].ratio.max == max(u.ratio.max for u in ups)
    assert kinds["up"].magnitude_grad_norm is None
    head, rule, *rows = summary(model).splitlines()
    assert [row.split()[:2] for row in rows] == [["up", "(3)"], ["down", "(3)"], ["Conv1d", "(1)"]]
    assert float(rows[0].split()[1:][head.split().index("ΔD")]) == pytest.approx(kinds["up"].direction_change, rel=1e-3)
    assert len({len(line) for line in (head, rule, *rows)}) == 1
    assert [row.split()[0] for row in summary(model, per_layer=True).splitlines()[2:]] == list(layers)


def recorded(steps: int = 4) -> tuple[MagnitudeHistory, nn.Module]:
    model = inject(chain(a=nn.Linear(4, 6), b=nn.Linear(6, 5)), r=2, alpha=4)
    optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.5)
    history = MagnitudeHistory()
    history.record(model, 0)
    for step in range(1, steps + 1):
        model(torch.randn(8, 4)).square().mean().backward()
        optimizer.step()
        history.record(model, step)
        optimizer.zero_grad()
    return history, model


def test_history_records_each_step():
    history, model = recorded()
    assert history.steps == [0, 1, 2, 3, 4]
    assert history.curve("a", "magnitude_change")[0] == 0
    assert history.curve("a", "magnitude_change")[-1] == pytest.approx(truth(model.a)["magnitude_change"], rel=1e-5)
    assert history.curve("a", "magnitude_grad_norm")[0] is None
    assert history.curve("a", "magnitude_grad_norm")[1] > 0
    history.record(model, 2)  # resumed from the checkpoint after step 2
    assert history.steps == [0, 1, 2] == list(range(len(history.layers)))


def test_history_to_and_from_json(tmp_path):
    history, _ = recorded()
    history.to_json(tmp_path / "history.json")
    again = MagnitudeHistory.from_json(tmp_path / "history.json")
    assert (again.steps, again.layers) == (history.steps, history.layers)


@pytest.mark.parametrize("text", ["not json", '{"steps": 1}', '[{"step": 1}]', '[{"step": 1, "layers": {"a": {}}}]'])
def test_history_refuses_other_files(tmp_path, text):
    (tmp_path / "history.json").write_text(text)
    with pytest.raises(ValueError, match=r"history\.json: not written by to_json"):
        MagnitudeHistory.from_json(tmp_path / "history.json")


def test_plot_shows_the_curves_and_leaves_pyplot_alone(tmp_path):
    pytest.importorskip("matplotlib")
    from matplotlib.image import imread

    history, _ = recorded()
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in sys.modules if name.startswith("matplotlib.pyplot")]:
            patch.delitem(sys.modules, name)
        history.plot(tmp_path / "history.png")
        assert "matplotlib.pyplot" not in sys.modules
    picture = imread(tmp_path / "history.png")
    assert picture.shape[0] > 400 and picture[..., :3].std() > 0.02
    panels = history.figure().axes
    a, b = panels[0].get_lines()
    assert (a.get_label(), b.get_label()) == ("a", "b")
    assert list(a.get_xdata()) == history.steps
    assert list(a.get_ydata()) == history.curve("a", "magnitude_change")
    assert math.isnan(panels[3].get_lines()[0].get_ydata()[0])
    with pytest.raises(ValueError, match="nothing was recorded"):
        MagnitudeHistory().figure()
