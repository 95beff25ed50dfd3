"""Find the best W8A8 form of a model by measurement: scales, rounding, linears in float (`search`)."""

from act_scales.search.search import LEAST_SEQUENCES, Wanted, search

__all__ = ["LEAST_SEQUENCES", "Wanted", "search"]
