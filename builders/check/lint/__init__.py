"""A linter for INT8 graphs: what every TensorRT version demands of a Q/DQ ONNX, and what it makes of the rest.

No engine is needed. `lint` gives the findings, `RULES` the rules with their reasons.
"""

from __future__ import annotations

from pathlib import Path

from builders.check.lint.products import Product, float_products, missing_products, quantized_products
from builders.check.lint.rule import Effect, Finding, Rule, Version
from builders.check.lint.rules import RULES
from builders.onnx_graph import OnnxGraph

NEWEST: Version = (11, 4)

__all__ = [
    "NEWEST",
    "RULES",
    "Effect",
    "Finding",
    "Product",
    "Rule",
    "Version",
    "float_products",
    "lint",
    "missing_products",
    "quantized_products",
]


def lint(graph: OnnxGraph | str | Path, tensorrt: Version = NEWEST) -> list[Finding]:
    """Findings of all rules, errors first. tensorrt: the version that is to take the graph. Of what is no valid ONNX
    that is the only one.

    Raises UserError for what is no ONNX file.
    """
    opened = graph if isinstance(graph, OnnxGraph) else OnnxGraph(graph)
    invalid, *others = RULES  # valid-onnx is the first
    found = list(invalid.check(opened, tensorrt)) or [one for rule in others for one in rule.check(opened, tensorrt)]
    return sorted(found, key=lambda finding: not finding.effect.is_error)
