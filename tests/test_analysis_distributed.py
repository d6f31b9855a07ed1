"""dora_ext.analysis of models under DDP and FSDP2, over two processes."""

import pytest
from distributed.launcher import Ranks


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.multi_gpu)])
def test_every_rank_sees_the_whole_layers(tmp_path, device):
    ranks = Ranks(2, device, tmp_path)
    try:
        expected, same = ranks.run("watching.numbers", engine=None)
        assert expected == same and len(expected) == 8
        for engine in ("ddp", "fsdp2"):
            for numbers in ranks.run("watching.numbers", engine=engine):
                assert numbers.keys() == expected.keys()
                for name, layer in numbers.items():
                    assert "magnitude_grad_norm" in layer
                    assert layer == pytest.approx(expected[name], rel=1e-5), (engine, name)
    finally:
        ranks.stop()
