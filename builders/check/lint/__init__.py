"""A linter for INT8 graphs: it knows what each TensorRT version demands of a Q/DQ ONNX graph.

It needs no engine. `lint` returns the findings; `RULES` are the rules with their reasons.
"""

from __future__ import annotations

from pathlib import Path

from builders.check.lint.products import (
    Product,
    float_products,
    missing_products,
    products_to_run,
    quantized_products,
)
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
    "products_to_run",
    "quantized_products",
]


def lint(graph: OnnxGraph | str | Path, tensorrt: Version = NEWEST) -> list[Finding]:
    """The findings of all rules, errors first. A graph that is not valid ONNX has that one finding alone.

    graph: an open graph, or the path of a file or of a folder that holds model.onnx. tensorrt: the version that will
    take the graph. Raises UserError if the file is not an ONNX model.
    """
    opened = graph if isinstance(graph, OnnxGraph) else OnnxGraph(graph)
    invalid, *others = RULES  # valid-onnx is the first
    found = list(invalid.check(opened, tensorrt)) or [one for rule in others for one in rule.check(opened, tensorrt)]
    return sorted(found, key=lambda finding: not finding.effect.is_error)
