"""A linter for INT8 graphs: what every TensorRT version demands of a Q/DQ ONNX, and what it makes of the rest.

No engine is needed. `lint` gives the findings, `RULES` the rules with their reasons.
"""

from __future__ import annotations

from pathlib import Path

from builders.lint.graph import OnnxGraph
from builders.lint.products import Product, quantized_products
from builders.lint.rule import Effect, Finding, Rule, Version
from builders.lint.rules import RULES

NEWEST: Version = (11, 4)

__all__ = [
    "NEWEST",
    "RULES",
    "Effect",
    "Finding",
    "OnnxGraph",
    "Product",
    "Rule",
    "Version",
    "lint",
    "quantized_products",
]


def lint(graph: OnnxGraph | str | Path, tensorrt: Version = NEWEST) -> list[Finding]:
    """Findings of all rules, errors first. tensorrt: the version that is to take the graph.

    Raises UserError for what is no ONNX file.
    """
    opened = graph if isinstance(graph, OnnxGraph) else OnnxGraph(graph)
    found = [finding for rule in RULES for finding in rule.check(opened, tensorrt)]
    return sorted(found, key=lambda finding: not finding.effect.is_error)
