"""bitsandbytes' layers under PEFT with enable() on and off."""

import pytest
import torch
from module_cases import assert_same, run
from peft_cases import quantised_layer

import dora_ext.integrations.peft as integration
from dora_ext.integrations.peft import forwards

peft = pytest.importorskip("peft")
pytestmark = [pytest.mark.usefixtures("peft_switched_off"), pytest.mark.filterwarnings("ignore::UserWarning")]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("kind", ["4 bits", "8 bits"])
def test_bitsandbytes(kind, dtype, tolerance, dropout, bias):
    x = torch.randn(3, 5, 64, dtype=dtype, requires_grad=True)
    # PEFT cannot call an 8-bit layer on the CPU twice: each has its own.
    expected = run(quantised_layer(kind, dtype, dropout, bias), x)
    layer = quantised_layer(kind, dtype, dropout, bias)
    with integration.enabled():
        for _ in range(2):
            before = forwards.calls["fused"]
            assert_same(run(layer, x), expected, tolerance)
            fused = kind == "4 bits" or not dropout
            assert forwards.calls["fused"] == before + fused
        if fused:
            assert layer.lora_magnitude_vector["default"].norm_cache.computed == 1


@pytest.mark.cuda
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["4 bits", "8 bits"])
def test_bitsandbytes_on_cuda(kind, dropout):
    layer = quantised_layer(kind, torch.float16, dropout, device="cuda")
    x = torch.randn(3, 5, 64, dtype=torch.float16, device="cuda", requires_grad=True)
    expected = {name: t.clone() for name, t in run(layer.eval(), x).items()}
    with integration.enabled():
        assert_same(run(layer, x), expected, 1e-2)


def test_a_4_bit_weight_is_not_kept_dense_for_backward():
    layer = quantised_layer("4 bits", torch.float32, 0.0)
    kept = []
    with (
        integration.enabled(),
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t),
    ):
        layer(torch.randn(5, 64))
    assert kept and torch.Size([32, 64]) not in kept
