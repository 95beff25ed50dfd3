"""What becomes of an ONNX graph in TensorRT: the linter's findings and, with a compiler, its verdict on every product.

A product that should be INT8 and is not is named with the likely reason: what the linter found at it, else what the
compiler made of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from builders.check.lint import (
    NEWEST,
    Effect,
    Finding,
    Product,
    Version,
    float_products,
    lint,
    quantized_products,
)
from builders.onnx_graph import OnnxGraph

if TYPE_CHECKING:
    from builders.check.tensorrt_rtx import Compilation

Compile = Callable[[OnnxGraph], "Compilation"]


@dataclass(frozen=True)
class ProductVerdict:
    """The compiler's, on a quantized product. layers: what computes it; why: it is not INT8."""

    product: str
    module: str
    int8: bool
    layers: tuple[str, ...]
    why: str = ""


@dataclass(frozen=True)
class CheckedGraph:
    """All that was found. products: the quantized ones, by their nodes; in_float: modules of the other products that
    have a weight; verdicts: none without a compiler, or where it refuses the graph."""

    path: Path
    findings: tuple[Finding, ...]
    products: tuple[str, ...] = ()
    in_float: tuple[str, ...] = ()
    compilation: Compilation | None = None
    verdicts: tuple[ProductVerdict, ...] = ()

    @property
    def lost(self) -> tuple[ProductVerdict, ...]:
        """Products that should be INT8 and are not."""
        return tuple(verdict for verdict in self.verdicts if not verdict.int8)

    @property
    def faults(self) -> list[str]:
        """What makes the check fail, one line each."""
        refused = self.compilation.errors if self.compilation else ()
        errors = [finding for finding in self.findings if finding.effect.is_error]
        known = {finding.product for finding in errors}
        return [
            *map(str, errors),
            *(f"{verdict.module} is not INT8: {verdict.why}" for verdict in self.lost if verdict.product not in known),
            *(f"TensorRT-RTX refuses the graph: {error}" for error in refused),
        ]

    @property
    def kinds(self) -> Counter[str]:
        """How many layers of each kind the engine has."""
        return Counter(layer.what for layer in self.compilation.layers) if self.compilation else Counter()

    def as_dict(self) -> dict:
        """As JSON."""
        content: dict = {
            "path": str(self.path),
            "passed": not self.faults,
            "products": list(self.products),
            "in_float": list(self.in_float),
            "findings": [asdict(found) | {"effect": found.effect.name.lower()} for found in self.findings],
        }
        if self.compilation:
            made = asdict(self.compilation)
            del made["messages"]
            content |= {"verdicts": [asdict(verdict) for verdict in self.verdicts], "compilation": made}
        return content


def check(path: str | Path, tensorrt: Version = NEWEST, compile: Compile | None = None) -> CheckedGraph:
    """Lint an ONNX file, or the one in a folder, and compile it. compile: gives the compiler's result.

    Raises UserError for what is no ONNX file, and what `compile` raises. What is not valid, and a graph without its
    data, is not compiled.
    """
    graph = OnnxGraph(path)
    findings = tuple(lint(graph, tensorrt))
    broken = {finding.rule for finding in findings}
    if "valid-onnx" in broken:
        return CheckedGraph(graph.path, findings)
    products = quantized_products(graph)
    seen = CheckedGraph(graph.path, findings, tuple(product.name for product in products), tuple(float_products(graph)))
    if compile is None or "external-data" in broken:
        return seen
    compilation = compile(graph)
    verdicts = () if compilation.errors else tuple(_verdicts(products, compilation, findings))
    return replace(seen, compilation=compilation, verdicts=verdicts)


def _verdicts(
    products: Sequence[Product], compilation: Compilation, findings: Sequence[Finding]
) -> Iterator[ProductVerdict]:
    int8 = compilation.int8_nodes()
    for product in products:
        layers = compilation.computing(product.name)
        kinds = tuple(dict.fromkeys(layer.what for layer in layers))
        module = product.module
        if product.name in int8:
            yield ProductVerdict(product.name, module, True, kinds)
            continue
        found = [one for one in findings if one.product == product.name and one.effect is not Effect.WORSE]
        if found:
            why = f"{found[0].what}; {found[0].do}"
        elif layers:
            reads = ", ".join(dict.fromkeys(dtype for layer in layers for dtype in layer.inputs))
            why = f"no known reason; the compiler computes it in {' and '.join(kinds)}, which reads {reads}"
        else:
            why = "no known reason; no layer of the engine names it (two nodes of one name?)"
        yield ProductVerdict(product.name, module, False, kinds, why)
