"""DoraEmbedding alone: constructor, ids, padding, scaled embeddings."""

import pytest
import torch
from module_cases import make_base, make_input, make_layer, run, train_a_little
from torch import nn

from dora_ext import DoraEmbedding, reference
from dora_ext.testing import DEVICES, assert_close


@pytest.mark.parametrize("options", [{}, {"padding_idx": -2}, {"use_rslora": True}], ids=str)
def test_constructor(options):
    layer = train_a_little(DoraEmbedding(20, 8, r=4, alpha=6, dtype=torch.float64, **options))
    assert set(layer.state_dict()) == {
        "base_layer.weight", "lora_embedding_A.default", "lora_embedding_B.default",
        "lora_magnitude_vector.default.weight",
    }  # fmt: skip
    assert not layer.base_layer.weight.requires_grad
    ids = make_input("embedding")
    A, B = (t.detach().clone().requires_grad_() for t in layer._factors())
    m = layer.magnitude.detach().clone().requires_grad_()
    expected = reference.embedding(ids, layer.weight, A, B, m, layer.scaling, padding_idx=layer.base_layer.padding_idx)
    expected.backward(torch.randn(expected.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64))
    results = run(layer, ids)
    assert_close(results["output"], expected, 1e-12)
    for key, leaf in (("embedding_A.default", A), ("embedding_B.default", B), ("magnitude_vector.default.weight", m)):
        assert_close(results[f"lora_{key}"], leaf.grad, 1e-12, key)


@pytest.mark.parametrize("device", DEVICES)
def test_ids_out_of_range(device):
    layer = make_layer("embedding", device=device)
    for ids in ([0, 20], [[3, -1]]):
        with pytest.raises(IndexError, match=r"ids: expected values in \[0, 20\), got (20|-1)"):
            layer(torch.tensor(ids, device=device))
    assert torch.isfinite(layer(torch.tensor([0, 19], device=device))).all()  # the device still works


def test_wrong_ids():
    layer = make_layer("embedding")
    for dtype in (torch.float32, torch.int16, torch.bool):
        with pytest.raises(TypeError, match="ids: expected int64 or int32"):
            layer(torch.ones(3, dtype=dtype))


def test_shapes_and_types_of_ids():
    layer, ids = make_layer("embedding"), make_input("embedding")
    y = layer(ids)
    assert torch.equal(layer(ids.int()), y)
    assert_close(layer(ids[1, 2]), y[1, 2], 1e-6)
    assert_close(layer(ids[:, ::2]), y[:, ::2], 1e-6)
    assert layer(ids[:0]).shape == (0, 6, 8)


def test_padding_column_gets_no_gradient():
    layer = make_layer("embedding padding")
    grads = run(layer, torch.tensor([[3, 3, 5]]))
    assert grads["lora_embedding_A.default"][:, 3].count_nonzero() == 0
    assert grads["lora_embedding_A.default"][:, 5].count_nonzero() > 0


def test_max_norm_scales_rows_of_the_weight():
    layer = make_layer("embedding max_norm")
    with torch.no_grad():
        layer.weight.mul_(5)
    layer(torch.tensor([2, 7]))
    norms = layer.weight.norm(dim=1)
    assert_close(norms[[2, 7]], torch.full((2,), 2.0), 1e-5)
    assert norms[3] > 2


def test_scaled_embeddings():
    """Numbers, and tensors as Gemma has them, which in half precision are rounded like the base layer's."""

    class Scaled(nn.Embedding):
        embed_scale = 3.0

        def forward(self, ids):
            return super().forward(ids) * self.embed_scale

    ids = make_input("embedding")
    layer = DoraEmbedding.from_base(Scaled(20, 8), r=4)
    assert_close(layer(ids), layer.base_layer(ids), 1e-6)
    train_a_little(layer)
    y = layer(ids)
    assert_close(layer.to_base()(ids), y, 1e-6)
    layer.merge()
    assert_close(layer(ids), y, 1e-6)
    gemma = make_base("embedding scaled", torch.bfloat16)
    layer = DoraEmbedding.from_base(gemma, r=4)
    assert_close(layer(ids), gemma(ids), 4e-3)
    gemma.embed_scale = torch.ones(2)
    with pytest.raises(ValueError, match="expected one number as its embed_scale"):
        DoraEmbedding.from_base(gemma)
