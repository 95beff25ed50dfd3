"""The types of the linter: rules, their findings, and the books that collect rules."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum

from builders.onnx_graph import OnnxGraph, module_of

Version = tuple[int, int]  # of TensorRT


class Effect(Enum):
    """The consequence of a fault."""

    REFUSED = "TensorRT refuses the graph"
    LOST = "the product runs in floating point, without a word"
    WRONG = "TensorRT computes something other than ONNX says, without a word"
    WORSE = "the engine works, but less well"

    @property
    def is_error(self) -> bool:
        return self is not Effect.WORSE


@dataclass(frozen=True)
class Finding:
    """One fault of a graph.

    rule: the id of the rule. node: the name of the node, or of a file. what: the fault in words. do: the remedy.
    because: the reason of the rule. product: the node name of the matrix product concerned, if there is one.
    """

    rule: str
    effect: Effect
    node: str
    what: str
    do: str
    because: str = ""
    product: str = ""

    @property
    def module(self) -> str:
        """The module of the product, or else of the node."""
        return module_of(self.product or self.node)

    def __str__(self) -> str:
        return f"{self.module}: {self.what}; {self.do}"


@dataclass(frozen=True)
class Rule:
    """One rule. demands: the condition that must hold. because: who demands it, in which TensorRT versions. effect:
    the usual consequence of a fault. check: the function that finds the faults in a graph."""

    id: str
    demands: str
    because: str
    effect: Effect
    check: Callable[[OnnxGraph, Version], Iterator[Finding]]


class Book:
    """The rules of one file, in order."""

    def __init__(self) -> None:
        self.rules: list[Rule] = []

    def rule(self, id: str, demands: str, because: str, effect: Effect) -> Callable:
        """A decorator that enters a generator as a rule. The generator yields (node, what, do), or with a dictionary
        of further fields of Finding at the end."""

        def enter(search: Callable) -> Callable:
            def check(graph: OnnxGraph, tensorrt: Version) -> Iterator[Finding]:
                for node, what, do, *more in search(graph, tensorrt):
                    details = {"effect": effect} | (more[0] if more else {})
                    yield Finding(rule=id, node=node, what=what, do=do, because=because, **details)

            self.rules.append(Rule(id, demands, because, effect, check))
            return search

        return enter
