"""What every whole layer does, whatever its type: equal PEFT, merge, copy, move, save, refuse bad arguments."""

import copy
import io
import pickle

import pytest
import torch
from module_cases import (
    ALL_BASES,
    BASES,
    ONE_OF_EACH,
    assert_same,
    dora_class,
    make_base,
    make_input,
    make_layer,
    peft_layer,
    run,
)
from torch import nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from dora_ext import DoraConv2d, DoraEmbedding, DoraLinear, invalidate_norms, reference
from dora_ext.testing import DEVICES, assert_close


def compiled(layer: nn.Module) -> nn.Module:
    torch._dynamo.reset()
    return torch.compile(layer, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize("options", [{}, {"dropout": 0.4}, {"use_rslora": True}], ids=str)
@pytest.mark.parametrize("name", BASES)
def test_forward_and_gradients_as_in_peft(name, options):
    """PEFT's state_dict fits as it is, keys and shapes."""
    pytest.importorskip("peft")
    base, x = make_base(name), make_input(name)
    theirs = peft_layer(base, **options)
    ours = dora_class(base).from_base(base, r=4, alpha=6, **options)
    assert ours.base_layer is base and not any(p.requires_grad for p in base.parameters())
    ours.load_state_dict(theirs.state_dict())
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for _ in range(2):  # the second time the norm comes from the cache
        assert_same(run(ours, x), run(theirs, x), 1e-5)
    theirs.merge()
    assert_close(ours.to_base().weight, theirs.base_layer.weight, 1e-6)
    theirs.unmerge()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ALL_BASES)
def test_against_float64(name, dtype, device):
    """Half-precision bases carry float32 adapters, whose gradients are float32."""
    layer = make_layer(name, dtype, device)
    x = make_input(name, dtype, device)
    truth_layer = copy.deepcopy(layer).double()
    if dtype == torch.float32:
        tolerance = 1e-5
    else:
        tolerance = 8e-3 if dtype == torch.bfloat16 else 1e-3
    truth = run(truth_layer, x.double() if x.is_floating_point() else x)
    for key, value in run(layer, x).items():
        assert value.dtype == (dtype if key in ("output", "x") else torch.float32)
        assert_close(value, truth[key], tolerance, key)


@pytest.mark.parametrize("name", ALL_BASES)
def test_weight_norm_and_merged_weight(name):
    """The plain layer's output is the DoRA layer's, and its rows have the lengths m."""
    layer, x = make_layer(name, torch.float64), make_input(name, torch.float64)
    plain = layer.to_base()
    assert type(plain) is type(layer.base_layer) and not {id(p) for p in plain.parameters()} & set(
        map(id, layer.parameters())
    )
    if name != "embedding max_norm":  # it scales the merged rows down again, as in PEFT
        assert_close(plain(x), layer(x), 1e-12)
    weight = plain.weight.T if layer.transposed else plain.weight.flatten(1)
    assert_close(weight.norm(dim=1), layer.magnitude.flatten().abs(), 1e-12)
    fresh = dora_class(layer.base_layer).from_base(layer.base_layer, r=8)
    base_weight = layer.base_layer.weight
    assert_close(
        fresh.weight_norm(), (base_weight.T if layer.transposed else base_weight).flatten(1).norm(dim=1), 1e-12
    )
    assert torch.equal(fresh.magnitude.flatten(), fresh.weight_norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ALL_BASES)
def test_merge_and_unmerge(name, dtype):
    layer, x = make_layer(name, dtype).eval(), make_input(name, dtype)
    before, weight, y = copy.deepcopy(layer.state_dict()), layer.weight, layer(x)
    layer.merge()
    assert layer.merged and layer.weight is not weight
    if name != "embedding max_norm":  # it scales the merged rows down again, as in PEFT
        assert_close(layer(x), y, 1e-5 if dtype == torch.float32 else 1e-2)
    assert list(layer.state_dict()) == list(before)
    other = pickle.loads(pickle.dumps(copy.deepcopy(layer)))
    assert torch.equal(other(x), layer(x))
    with pytest.raises(RuntimeError, match="merged already"):
        layer.merge()
    with pytest.raises(RuntimeError, match="to_base: the layer is merged"):
        layer.to_base()
    with pytest.raises(RuntimeError, match="load_state_dict: the layer is merged"):
        layer.load_state_dict(before)
    with pytest.raises(RuntimeError, match="reset_parameters: the layer is merged"):
        layer.reset_parameters()
    assert other.double()(x.double() if x.is_floating_point() else x).dtype == torch.float64
    layer.unmerge()
    with pytest.raises(RuntimeError, match="not merged"):
        layer.unmerge()
    assert layer.weight is weight
    if name != "embedding max_norm":
        assert all(torch.equal(v, before[k]) for k, v in layer.state_dict().items())


def test_merge_leaves_tied_weights_alone():
    embedding, head = nn.Embedding(20, 8), nn.Linear(8, 20, bias=False)
    head.weight = embedding.weight
    layer = DoraEmbedding.from_base(embedding, r=2)
    nn.init.normal_(layer.lora_embedding_A["default"])
    before = head.weight.clone()
    layer.merge()
    assert torch.equal(head.weight, before) and head.weight is embedding.weight


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_starts_as_the_base_layer(name):
    """B A = 0 and m = n exactly: the output is the base layer's to the last rounding."""
    for dtype in (torch.float32, torch.bfloat16):
        base, x = make_base(name, dtype), make_input(name, dtype)
        assert_close(dora_class(base).from_base(base)(x), base(x), 1e-6 if dtype == torch.float32 else 4e-3)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_copies_have_the_same_results(name):
    layer, x = make_layer(name, dropout=0.3), make_input(name)
    expected = run(layer, x)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    fresh = dora_class(layer.base_layer).from_base(make_base(name), r=4, alpha=6, dropout=0.3)
    fresh.load_state_dict(layer.state_dict())
    for other in (
        copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(buffer, weights_only=False), fresh,
    ):  # fmt: skip
        assert_same(run(other, x), expected, 0)
        assert other.norm_cache is not layer.norm_cache and other.weight is not layer.weight


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_dtype_moves(name):
    layer = make_layer(name)
    for dtype in (torch.float64, torch.bfloat16, torch.float16, torch.float32):
        layer.to(dtype)
        results = run(layer, make_input(name, dtype))
        assert {t.dtype for t in results.values()} == {dtype}
    assert {p.dtype for p in layer.half().parameters()} == {torch.float16}


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_adapter_dtype(name):
    base = make_base(name, torch.bfloat16)
    for adapter_dtype, expected in ((None, torch.float32), (torch.bfloat16, torch.bfloat16)):
        layer = dora_class(base).from_base(base, adapter_dtype=adapter_dtype)
        assert {p.dtype for n, p in layer.named_parameters() if "lora_" in n} == {expected}


@pytest.mark.parametrize("options", [{}, {"dropout": 0.4}], ids=str)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_autocast(name, device, options):
    """Half-precision products of float32 weights; the norm stays that of the float32 weights."""
    layer, x = make_layer(name, device=device, **options), make_input(name, device=device)
    expected = run(layer, x)
    with torch.autocast(device, torch.bfloat16):
        results = run(layer, x)
    embedding = name.startswith("embedding")  # F.embedding isn't cast either
    assert results["output"].dtype == (torch.float32 if embedding else torch.bfloat16)
    for key, value in results.items():
        assert key == "output" or value.dtype == torch.float32
        assert_close(value, expected[key], 1e-6 if embedding else 1e-2, key)


@pytest.mark.parametrize("name", ALL_BASES)
def test_gradcheck(name):
    """With the norm held constant, as section 4.3 of the paper has it."""
    if name == "embedding max_norm":
        pytest.skip("its forward changes A")
    layer, x = make_layer(name, torch.float64), make_input(name, torch.float64)
    norm = layer.weight_norm()
    layer._norm_and_gain = lambda *_: (norm, reference.gain(layer.magnitude.detach().flatten(), norm))
    names = [n for n, p in layer.named_parameters() if p.requires_grad]
    parameters = [dict(layer.named_parameters())[n].detach().clone().requires_grad_() for n in names]
    by_freq_or_padding = name in ("embedding padding", "embedding by freq", "embedding scaled")
    if by_freq_or_padding:  # their gradient of A is not the derivative, on purpose
        parameters[0].requires_grad_(False)

    def call(x, *tensors):
        return functional_call(layer, dict(zip(names, tensors, strict=True)), x)

    assert torch.autograd.gradcheck(call, (x, *parameters), fast_mode=True)


@pytest.mark.parametrize("options", [{}, {"dropout": 0.4}], ids=str)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", [*ONE_OF_EACH, "conv1d grouped", "conv2d circular"])
def test_compiled(name, device, options):
    """In one graph. Dropout's random numbers are others there, so only that it runs and stays near is asked."""
    layer, x = make_layer(name, device=device, **options), make_input(name, device=device)
    expected = run(layer, x)
    results = run(compiled(layer), x)
    results = {k.removeprefix("_orig_mod."): v for k, v in results.items()}
    if not options:
        assert_same(results, expected, 1e-5)
    layer.eval()
    assert_close(compiled(layer)(x), layer(x), 1e-5)
    layer.merge()
    assert_close(compiled(layer)(x), layer(x), 1e-5)


@pytest.mark.slow
def test_compiled_with_inductor():
    torch._dynamo.reset()
    layer, x = make_layer("linear"), make_input("linear")
    expected = run(layer, x)
    results = run(torch.compile(layer, fullgraph=True), x)
    assert_same({k.removeprefix("_orig_mod."): v for k, v in results.items()}, expected, 1e-5)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", ["linear", "conv2d"])
def test_checkpointing(name, use_reentrant):
    layer, x = make_layer(name, dropout=0.3), make_input(name)
    expected = run(layer, x)

    class Checkpointed(nn.Module):
        def forward(self, x):
            return checkpoint(layer, x, use_reentrant=use_reentrant)

    layer.zero_grad()
    outer = Checkpointed()
    outer.named_parameters = layer.named_parameters
    outer.zero_grad = layer.zero_grad
    assert_same(run(outer, x), expected, 1e-6)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_norms_follow_training(name, device):
    """Steps of an optimizer, load_state_dict, writes through .data: each forward is that of a fresh copy."""
    layer, x = make_layer(name, device=device), make_input(name, device=device)
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=0.1)

    def check():
        assert_close(layer(x), copy.deepcopy(layer)(x), 1e-6)

    for _ in range(3):
        run(layer, x)
        optimizer.step()
        check()
    first, second = layer._factors()
    for change in (
        lambda: layer.load_state_dict(make_layer(name, device=device).state_dict()),
        lambda: first.data.mul_(3),
        lambda: second.data.add_(0.1),
        lambda: layer.base_layer.weight.data.mul_(0.3),
        lambda: (layer.merge(), layer.unmerge()),
        lambda: layer.reset_parameters(),
        lambda: invalidate_norms(layer),
    ):
        change()
        check()


@pytest.mark.parametrize("name", ["linear", "embedding", "conv2d", "conv1d grouped"])
def test_autocast_touches_no_norm_and_no_merged_weight(name):
    layer = make_layer(name)
    norm, weight = layer.weight_norm(), layer.to_base().weight
    with torch.autocast("cpu", torch.bfloat16):
        layer.norm_cache.clear()
        assert_close(layer.weight_norm(), norm, 1e-6)
        assert_close(layer.to_base().weight, weight, 1e-6)


def test_norms_are_reused():
    for name in ONE_OF_EACH:
        layer, x = make_layer(name), make_input(name)
        layer.norm_cache.clear()
        for _ in range(3):
            run(layer, x)
        assert layer.norm_cache.computed == 1, name


@pytest.mark.parametrize("name", [*ONE_OF_EACH, "conv1d grouped"])
def test_meta_device(name):
    """Construct without memory, then materialise and load, or reset."""
    with torch.device("meta"):
        base = make_base(name, device="meta")
    layer = dora_class(base).from_base(base, r=4, alpha=6)
    assert all(p.is_meta for p in layer.parameters())
    layer.to_empty(device="cpu")
    expected = make_layer(name)
    layer.load_state_dict(expected.state_dict())
    x = make_input(name)
    assert_same(run(layer, x), run(expected, x), 0)
    layer.reset_parameters()
    assert_close(layer(x), expected.base_layer(x), 1e-6)
    by_assigning = dora_class(base).from_base(make_base(name, device="meta"), r=4, alpha=6)
    by_assigning.load_state_dict(expected.state_dict(), assign=True)
    assert_same(run(by_assigning.train(), x), run(expected, x), 0)


@pytest.fixture
def one_rank():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_fully_sharded(name, one_rank):
    """FSDP2: parameters are DTensors between forwards; training steps, norms and merging are those of a plain layer."""
    from torch.distributed.fsdp import fully_shard

    expected, x = make_layer(name), make_input(name)
    sharded = copy.deepcopy(expected)
    fully_shard(sharded, mesh=one_rank)
    optimizers = [torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1) for m in (expected, sharded)]
    for _ in range(3):
        for layer, optimizer in zip((expected, sharded), optimizers, strict=True):
            run(layer, x)
            optimizer.step()
        assert_close(sharded(x), expected(x), 1e-6)
        sharded.reshard()  # FSDP2 leaves its outermost module whole after a forward
    assert type(sharded.magnitude).__name__ != "Parameter"
    assert_close(sharded.weight_norm(), expected.weight_norm(), 1e-6)
    for layer in (expected, sharded):
        layer.merge()
    assert_close(sharded(x), expected(x), 1e-6)


@pytest.mark.parametrize("name", ["linear", "conv1d", "conv2d", "conv3d", "embedding"])
def test_empty_batch(name):
    layer = make_layer(name)
    x = make_input(name)[:0].detach().requires_grad_(not name.startswith("embedding"))
    y = layer(x)
    assert y.shape == layer.base_layer(x).shape
    y.sum().backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in layer.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", ["linear", "gpt2 conv1d", "conv2d", "embedding"])
def test_noncontiguous_inputs(name):
    layer, x = make_layer(name), make_input(name).detach()
    strided = x.repeat_interleave(2, dim=-1)[..., ::2]
    assert not strided.is_contiguous()
    assert_same(run(layer, strided), run(layer, x), 1e-6)
    expanded = x[:1].expand_as(x)
    assert_close(layer(expanded), layer(expanded.contiguous()), 1e-6)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_zero_features(name):
    """n = 0: the output is the bias alone, m gets no gradient, nothing is NaN."""
    for dtype in (torch.float32, torch.bfloat16):
        layer, x = make_layer(name, dtype), make_input(name, dtype)
        weight, (_, lora_B) = layer.base_layer.weight, layer._factors()
        with torch.no_grad():
            weight[(slice(None), 2) if layer.transposed else 2] = 0
            lora_B[2] = 0
        results = run(layer, x)
        assert all(torch.isfinite(t).all() for t in results.values())
        y = results["output"].movedim(1, -1) if name.startswith("conv") else results["output"]
        bias = getattr(layer.base_layer, "bias", None)
        assert torch.equal(y[..., 2], (torch.zeros(()) if bias is None else bias[2]).to(dtype).expand_as(y[..., 2]))
        assert results["lora_magnitude_vector.default.weight"].flatten()[2] == 0
        layer.merge()
        assert torch.isfinite(layer(x)).all()


def test_huge_float16_weights_have_a_norm():
    """Sums of squares beyond 65504, which PEFT's float16 norm turns into infinity."""
    base = nn.Linear(64, 8).half()
    with torch.no_grad():
        base.weight.mul_(2000)
    layer = DoraLinear.from_base(base, r=2)
    assert_close(layer.weight_norm(), base.weight.double().norm(dim=1), 1e-6)
    assert torch.isfinite(layer(torch.randn(3, 64).half() / 100)).all()


@pytest.mark.parametrize("make", [lambda **o: DoraLinear(6, 4, **o), lambda **o: DoraConv2d(4, 6, 3, **o),
                                  lambda **o: DoraEmbedding(9, 4, **o)])  # fmt: skip
@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"r": 0}, ValueError, "r: expected at least 1, got 0"),
        ({"r": -3}, ValueError, "r: expected at least 1, got -3"),
        ({"r": 2.0}, TypeError, "r: expected a whole number, got 2.0"),
        ({"alpha": float("inf")}, ValueError, "alpha: expected a finite number, got inf"),
        ({"alpha": float("nan")}, ValueError, "alpha: expected a finite number, got nan"),
        ({"alpha": "16"}, TypeError, "alpha: expected a number, got '16'"),
        ({"dropout": 1.0}, ValueError, r"dropout: expected it in \[0, 1\), got 1.0"),
        ({"dropout": -0.1}, ValueError, r"dropout: expected it in \[0, 1\), got -0.1"),
        ({"dtype": torch.complex64}, TypeError, "expected a weight in .*, got torch.complex64"),
        ({"adapter_dtype": torch.int32}, TypeError, "adapter_dtype: expected a float dtype, got torch.int32"),
    ],
)
def test_bad_options(make, options, error, message):
    with pytest.raises(error, match=message):
        make(**options)


def test_bad_bases():
    for cls in (DoraLinear, DoraEmbedding, DoraConv2d):
        for layer in (nn.LayerNorm(4), nn.ConvTranspose2d(4, 4, 3), make_layer("linear")):
            with pytest.raises(TypeError, match=rf"{cls.__name__}: layer: expected .*, got {type(layer).__name__}"):
                cls.from_base(layer)
    integers = nn.Linear(4, 3)
    integers.weight = nn.Parameter(torch.ones(3, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match=r"expected a weight in .*, got torch.int8"):
        DoraLinear.from_base(integers)
    with pytest.raises(ValueError, match="not initialised yet"):
        DoraLinear.from_base(nn.LazyLinear(4))
    grouped = nn.Conv2d(4, 8, 3, groups=4)
    with pytest.raises(ValueError, match="r: expected a multiple of groups=4, got 6"):
        DoraConv2d.from_base(grouped, r=6)
    assert all(p.requires_grad for p in grouped.parameters())  # what was refused is as it was
