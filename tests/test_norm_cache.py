"""A cached norm must be used again while nothing changed, and never after anything did."""

import copy
import gc
import pickle

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

from dora_ext import reference
from dora_ext.norm_cache import NormCache
from dora_ext.ops import norm_and_gain
from dora_ext.testing import DEVICES, adapter, assert_close, doubles


class Case:
    def __init__(self, device, dtype=torch.float32, transposed=False):
        self.t = adapter(24, 40, 4, dtype=dtype, device=device, bias=False, transposed=transposed)
        self.t = {k: torch.nn.Parameter(v.detach(), requires_grad=v.requires_grad) for k, v in self.t.items()}
        self.cache, self.scaling, self.transposed = NormCache(), 1.5, transposed

    def check(self):
        """The cache's answer equals the reference; returns how many norms have been computed so far."""
        norm, gain = norm_and_gain(**self.t, scaling=self.scaling, transposed=self.transposed, cache=self.cache)
        ref = doubles(self.t)
        expected = reference.weight_norm(ref["weight"], ref["lora_A"], ref["lora_B"], self.scaling, self.transposed)
        assert_close(norm, expected, 1e-6, "norm")
        assert_close(gain, reference.gain(ref["magnitude"], expected), 1e-6, "gain")
        return self.cache.computed


@pytest.fixture(params=DEVICES)
def case(request):
    return Case(request.param)


def test_used_again_while_nothing_changed(case):
    assert [case.check() for _ in range(4)] == [1, 1, 1, 1]


def test_a_new_magnitude_changes_the_gain_alone(case):
    case.check()
    with torch.no_grad():
        case.t["magnitude"].mul_(2)
    assert case.check() == 1
    case.t["magnitude"].data.mul_(2)
    assert case.check() == 1


CHANGES = {
    "in place": lambda p: p.detach().mul_(1.5),
    "copy_": lambda p: p.detach().copy_(torch.randn_like(p)),
    "data.copy_": lambda p: p.data.copy_(torch.randn_like(p)),
    "data.add_": lambda p: p.data.add_(0.01),
    "data.zero_": lambda p: p.data.zero_(),
    "one row through data": lambda p: p.data[-1].add_(1.0),
    "one column through data": lambda p: p.data[:, 1].add_(1.0),
    "data replaced": lambda p: setattr(p, "data", torch.randn_like(p)),
    "numpy or raw pointer": lambda p: (
        torch.from_numpy(p.detach().numpy()).mul_(2) if p.device.type == "cpu" else p.data.mul_(2)
    ),
    "swap": lambda p: torch.utils.swap_tensors(p, torch.nn.Parameter(torch.randn_like(p), p.requires_grad)),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", ["weight", "lora_A", "lora_B"])
def test_every_way_of_changing_a_tensor_is_seen(case, name, change):
    case.check()
    CHANGES[change](case.t[name])
    assert case.check() == 2


@pytest.mark.parametrize("name", ["lora_A", "lora_B"])
def test_one_element_of_an_adapter_through_data(case, name):
    case.check()
    case.t[name].data.view(-1)[7] += 0.5
    assert case.check() == 2


def test_a_wide_weight_changed_in_one_row_or_column():
    case = Case("cpu")
    case.t["weight"] = torch.nn.Parameter(torch.randn(24, 3000), requires_grad=False)
    case.t["lora_A"] = torch.nn.Parameter(torch.randn(4, 3000))
    case.check()
    case.t["weight"].data[:, 1777].add_(1.0)
    assert case.check() == 2
    case.t["weight"].data[13].add_(1.0)
    assert case.check() == 3


def test_another_tensor_object_or_scaling(case):
    case.check()
    case.t["lora_B"] = torch.nn.Parameter(torch.randn_like(case.t["lora_B"]))
    assert case.check() == 2
    case.scaling = 0.25
    assert case.check() == 3


def test_an_optimizer_that_writes_through_raw_pointers(case):
    class Raw(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {})

        def step(self, closure=None):
            # A single element of a weight: invisible to versions and, in W, to the fingerprint.
            case.t["weight"].data[2, 3] += 10.0

    case.check()
    Raw([case.t["lora_B"]]).step()
    assert case.check() == 2


def test_optimizer_steps_make_every_norm_stale(case):
    optimizer = torch.optim.SGD([case.t["lora_B"]], lr=0.1)
    for step in range(3):
        for _ in range(4):  # gradient accumulation
            assert case.check() == step + 1
        case.t["lora_B"].grad = torch.ones_like(case.t["lora_B"])
        optimizer.step()


def test_clear(case):
    case.check()
    case.cache.clear()
    assert case.check() == 1


def test_keeps_no_weight_alive(case):
    case.check()
    gone = [StorageWeakRef(case.t[k].untyped_storage()) for k in ("weight", "lora_A", "lora_B")]
    case.t.clear()
    gc.collect()
    assert all(r.expired() for r in gone)


def test_a_freed_tensors_address_is_not_trusted():
    """Address and version repeat after a free; identity does not."""
    case = Case("cpu")
    case.check()
    for _ in range(20):
        with torch.no_grad():
            case.t["weight"] = torch.nn.Parameter(torch.randn(24, 40), requires_grad=False)
        case.check()


def test_copies_and_pickles_are_empty(case):
    case.check()
    for other in (copy.deepcopy(case.cache), copy.copy(case.cache), pickle.loads(pickle.dumps(case.cache))):
        assert isinstance(other, NormCache) and other.computed == 0


def test_inference_mode():
    case = Case("cpu")
    with torch.inference_mode():
        case.check()
        case.t = {k: v.detach().clone() for k, v in case.t.items()}
        case.check()
        case.t["weight"].mul_(2)
        case.check()


def test_compiled_code_computes_the_norm_itself(case):
    torch._dynamo.reset()
    compiled = torch.compile(lambda **t: norm_and_gain(**t, scaling=1.5, cache=case.cache)[0], fullgraph=True)
    first = compiled(**case.t)
    case.t["lora_B"].data.mul_(2)
    assert not torch.equal(first, compiled(**case.t)) and case.cache.computed == 0


@pytest.mark.cuda
def test_two_streams():
    case = Case("cuda")
    for _ in range(3):
        for stream in (torch.cuda.Stream(), torch.cuda.default_stream()):
            torch.cuda.synchronize()
            with torch.cuda.stream(stream):
                case.check()


@pytest.mark.cuda
def test_a_captured_graph_computes_the_norm_itself():
    case = Case("cuda")
    case.check()
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        norm, _ = norm_and_gain(**case.t, scaling=1.5, cache=case.cache)
    case.t["lora_B"].data.mul_(2)
    graph.replay()
    ref = doubles(case.t)
    assert_close(norm, reference.weight_norm(ref["weight"], ref["lora_A"], ref["lora_B"], 1.5), 1e-6)
