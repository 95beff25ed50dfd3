"""What a rule is, and what it finds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import Enum

from builders.onnx_graph import OnnxGraph, module_of

Version = tuple[int, int]  # of TensorRT


class Effect(Enum):
    """What comes of it."""

    REFUSED = "TensorRT refuses the graph"
    LOST = "the product runs in floating point, without a word"
    WRONG = "TensorRT computes something else than ONNX says, without a word"
    WORSE = "it works, and less well"

    @property
    def is_error(self) -> bool:
        return self is not Effect.WORSE


@dataclass(frozen=True)
class Finding:
    """One fault. node: its name, or that of a file; product: the matrix product concerned, if one is.

    what: in the user's words; do: what to do about it; because: the rule's reason.
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
        """Of the product, else of the node."""
        return module_of(self.product or self.node)

    def __str__(self) -> str:
        return f"{self.module}: {self.what}; {self.do}"


@dataclass(frozen=True)
class Rule:
    """A rule. demands: what must hold; because: who demands it, and of which TensorRT versions."""

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
        """Enter a generator of (node, what, do) or (node, what, do, more of Finding) as a rule."""

        def enter(search: Callable) -> Callable:
            def check(graph: OnnxGraph, tensorrt: Version) -> Iterator[Finding]:
                for node, what, do, *more in search(graph, tensorrt):
                    details = {"effect": effect} | (more[0] if more else {})
                    yield Finding(rule=id, node=node, what=what, do=do, because=because, **details)

            self.rules.append(Rule(id, demands, because, effect, check))
            return search

        return enter
