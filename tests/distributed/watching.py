"""Scenario: what a model that is spread over processes shows of its DoRA layers."""

from dora_ext.analysis import analyse

from .launcher import Rank
from .models import make_model, spread
from .training import loss_of, make_batch


def numbers(rank: Rank, engine: str | None) -> dict[str, dict[str, float]]:
    """Every layer's numbers, the magnitude's gradient among them; all ranks have the same batch."""
    plain = make_model("mixed", rank.device)
    model = spread(plain, engine, rank.device) if engine else plain
    loss_of(model, make_batch(0, 0, rank.device)).backward()
    return {name: layer.scalars() for name, layer in analyse(model).items()}
