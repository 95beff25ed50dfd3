"""Check what TensorRT makes of an ONNX graph: the linter's findings and, with a compiler, a verdict on every product.

A product that should be INT8 and is not is named with the likely reason: the linter's finding about it, or else the
kernel that the compiler chose for it.
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
    """The compiler's verdict on one quantized product.

    product: the name of its node. module: the module it belongs to. int8: whether an INT8 kernel computes it. layers:
    the kinds of the engine layers that compute it. why: the reason if it is not INT8.
    """

    product: str
    module: str
    int8: bool
    layers: tuple[str, ...]
    why: str = ""


@dataclass(frozen=True)
class CheckedGraph:
    """Everything that a check found in one graph.

    products: node names of the quantized products. in_float: modules of the other products that have a weight.
    verdicts: one for each quantized product; empty without a compiler, or if the compiler refuses the graph.
    """

    path: Path
    findings: tuple[Finding, ...]
    products: tuple[str, ...] = ()
    in_float: tuple[str, ...] = ()
    compilation: Compilation | None = None
    verdicts: tuple[ProductVerdict, ...] = ()

    @property
    def lost(self) -> tuple[ProductVerdict, ...]:
        """The verdicts on products that should be INT8 and are not."""
        return tuple(verdict for verdict in self.verdicts if not verdict.int8)

    @property
    def faults(self) -> list[str]:
        """The reasons why the check fails, one line each; empty if it passes."""
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
        """The number of engine layers of each kind; empty without a compilation."""
        return Counter(layer.what for layer in self.compilation.layers) if self.compilation else Counter()

    def as_dict(self) -> dict:
        """The content as a dictionary for JSON, without the compiler's log."""
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
    """The linter's findings on an ONNX file, and the compiler's verdicts on it.

    path: the file, or a folder that holds model.onnx. tensorrt: the version that will take the graph. compile: a
    function that compiles the graph; without one the graph is only linted. A graph that is not valid ONNX, or whose
    data are missing, is not compiled.
    Raises UserError if the file is not an ONNX model, and the errors of `compile`.
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
            why = "no known reason; no layer of the engine names it (do two nodes have this name?)"
        yield ProductVerdict(product.name, module, False, kinds, why)
