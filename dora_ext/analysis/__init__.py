"""What DoRA does to a model: magnitudes, norms, and how far magnitude and direction have moved, layer by layer."""

from .history import MagnitudeHistory
from .measure import LayerAnalysis, Spread, analyse, by_kind, summary

__all__ = ["LayerAnalysis", "MagnitudeHistory", "Spread", "analyse", "by_kind", "summary"]
