"""Find the best W8A8 form of a model by measurement: scales, rounding, linears in float (`search`)."""

from act_scales.search.search import Wanted, search

__all__ = ["Wanted", "search"]
