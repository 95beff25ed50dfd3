"""Every rule by a graph that breaks it, and what the real compiler says to the same graph.

Where the package is missing, the linter is tested alone. The compiler is TensorRT-RTX 1.7, of the generation of 11.4:
a rule of older versions, or a computation that differs, it cannot confirm.
"""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from builders.check.lint import RULES, Effect, lint
from builders.check.lint.rules.operators import ABSENT
from builders.check.tensorrt_rtx import available
from builders.check.tensorrt_rtx.packages import bindings
from builders.onnx_graph import OnnxGraph
from tests.builders.check.lint.faults import FAULTS, FINE, FLOATS
from tests.builders.check.lint.graphs import LINEAR, K, N, W, X, graph, saved, verdict
from tests.lacking import with_compiler


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_found(name: str, tmp_path: Path) -> None:
    fault = FAULTS[name]
    found = lint(saved(graph(fault.body, *fault.io, fault.opset), tmp_path), fault.tensorrt)
    assert {finding.rule for finding in found} == {fault.rule, *fault.also}, [str(one) for one in found]
    mine = [str(finding) for finding in found if finding.rule == fault.rule]
    assert any(fault.says in text for text in mine), mine
    assert {finding.module for finding in found if finding.product} <= {LINEAR, "layer/other"}


@with_compiler
@pytest.mark.parametrize("name", FAULTS)
def test_the_compiler_agrees(name: str, tmp_path: Path) -> None:
    """What the linter says will be refused is refused, what it says will be lost is lost; the rest builds."""
    fault = FAULTS[name]
    path = saved(graph(fault.body, *fault.io, fault.opset), tmp_path)
    assert verdict(path) == fault.compiler
    effects = {finding.effect for finding in lint(path)}
    if Effect.REFUSED in effects:
        assert fault.compiler == "refused"
    elif Effect.LOST in effects:
        assert fault.compiler == "lost"
    else:
        assert fault.compiler == "fine"


FUNCTION = onnx.helper.make_function(
    "local",
    "twice",
    ["a"],
    ["b"],
    [onnx.helper.make_node("Add", ["a", "a"], ["b"])],
    [onnx.helper.make_opsetid("", 21)],
)


@pytest.mark.parametrize("name", FINE)
def test_what_is_fine_is_not_found_fault_with(name: str, tmp_path: Path) -> None:
    model = graph(FINE[name])
    if "local" in FINE[name]:
        model.functions.append(FUNCTION)
    path = saved(model, tmp_path)
    assert [str(finding) for finding in lint(path)] == []
    if available():
        assert verdict(path) == "fine"


def test_half_bodies_are_fine(tmp_path: Path) -> None:
    body = f"h = Cast <to = 1> (x) {X.replace('(x,', '(h,')} {W} p = MatMul(xd, wd)  y = Cast <to = 10> (p)"
    path = saved(graph(body, *FLOATS), tmp_path)
    assert lint(path) == []
    if available():
        assert verdict(path) == "fine"


@with_compiler
def test_absent_operators_are_those_that_the_parser_denies() -> None:
    trt = bindings()
    log = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(log)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    known = {schema.name for schema in onnx.defs.get_all_schemas() if schema.domain == ""}
    denied = {name for name in known if not parser.supports_operator(name)}
    assert denied == ABSENT & known


def test_every_rule_has_a_fault_and_a_reason() -> None:
    elsewhere = {"external-data", "valid-onnx", "missing-product"}  # tests/builders/check/lint/test_lint.py
    assert {rule.id for rule in RULES} == {fault.rule for fault in FAULTS.values()} | elsewhere
    assert all(rule.demands and rule.because for rule in RULES)
    assert len({rule.id for rule in RULES}) == len(RULES)


def test_names_of_unnamed_nodes_are_those_of_the_parser(tmp_path: Path) -> None:
    path = saved(graph(f"{X} {W} y = MatMul(xd, wd)"), tmp_path)
    assert OnnxGraph(path).nodes[-1].name == ""
    if available():
        assert verdict(path) == "fine"


assert N != K  # so that a scale along the wrong axis shows
