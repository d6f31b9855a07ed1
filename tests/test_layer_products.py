"""The two large products of a linear layer (csrc/layer_products.cpp): each way to compute them gives the reference."""

import pytest
import torch
from test_linear_op import Case

from dora_ext.testing import TOLERANCE, assert_close


@pytest.fixture
def choose():
    """Which products layers run on; as it was again afterwards."""
    before = torch.ops.dora_ext.choose_products("auto")
    yield torch.ops.dora_ext.choose_products
    torch.ops.dora_ext.choose_products(before)


def test_choice_of_products(choose):
    assert choose("library") == "auto" and choose("auto") == "library"
    with pytest.raises(ValueError, match="which: expected auto, library or hopper, got fast"):
        choose("fast")
    assert choose("auto") == "auto"


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_product_gives_the_reference(device, choose, dtype, transposed):
    case = Case(300, 264, 520, 24, device, dtype, transposed=transposed)
    expected_y, expected = case.reference()
    for which in ("library", "hopper"):  # the latter only where there is one
        choose(which)
        y, h, norm, gain = case.forward()
        assert_close(y, expected_y, TOLERANCE[dtype], f"y, {which}")
        case.check(case.backward(y, h, norm, gain), expected, TOLERANCE[dtype])


@pytest.mark.parametrize("transposed", [False, True])
def test_factors_that_start_anywhere(device, choose, transposed):
    """As views into one flat buffer do; scaling 1, so that nothing has to be computed of them first."""
    case = Case(300, 264, 520, 24, device, torch.bfloat16, transposed=transposed, scaling=1.0)
    for name in ("lora_A", "lora_B"):
        t = case.layer[name]
        case.layer[name] = torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)
    choose("hopper")
    y, h, norm, gain = case.forward()
    expected_y, expected = case.reference()
    assert_close(y, expected_y, TOLERANCE[torch.bfloat16], "y")
    case.check(case.backward(y, h, norm, gain), expected, TOLERANCE[torch.bfloat16])


@pytest.mark.parametrize("r", [8, 32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_more_tokens_than_features(device, dtype, r):
    """On CUDA the gradient of x then comes from g W, and G is not made."""
    case = Case(1000, 264, 136, r, device, dtype, param_dtype=torch.float32)
    y, h, norm, gain = case.forward()
    _, expected = case.reference()
    case.check(case.backward(y, h, norm, gain), expected, TOLERANCE[dtype])
    case.check(case.backward(y, h, norm, gain, mask=1), expected, TOLERANCE[dtype], mask=1)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_scale_rows(dtype):
    for shape in [(3, 8), (130, 264), (2000, 1032), (0, 8), (4, 0)]:
        weight, gain = torch.randn(shape, device="cuda").to(dtype), torch.randn(shape[0], device="cuda")
        scaled = torch.ops.dora_ext.scale_rows(weight, gain)
        assert torch.equal(scaled, (weight.float() * gain[:, None]).to(dtype)), shape
    torch.library.opcheck(torch.ops.dora_ext.scale_rows.default, (weight, gain))
    for wrong in (weight.float(), torch.ones(4, 9, device="cuda", dtype=dtype), weight.new_ones(8, 4).t()):
        with pytest.raises(ValueError, match="weight: expected a contiguous matrix"):
            torch.ops.dora_ext.scale_rows(wrong, gain)
