"""The layers of an engine, read from the table that the compiler logs. One row of it:

Name: N, LayerType: gemm, Inputs: [ { ..., Datatype: Int8, ...}], Constants: [...], Outputs: [ { ..., Datatype:
Float, ...}], TacticName: T, StreamId: 0, Metadata: [ONNX Layer: node][ONNX Layer: node]
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

ROW = re.compile(r"Name: (?P<name>.*?), LayerType: (?P<kind>\w+), Inputs: \[(?P<inputs>.*?)\], (Constants|Outputs): ")
OUTPUTS = re.compile(r"Outputs: \[(.*?)\], TacticName: ")
DTYPE, NODE = re.compile(r"Datatype: (\w+)"), re.compile(r"\[ONNX Layer: (.*?)\]")
GEMM = "gemm"


@dataclass(frozen=True)
class Layer:
    """A layer of the engine: one kernel, as a rule.

    kind: gemm (a matrix product), kgen (a generated kernel: norms, activations, attention), others that move data.
    inputs, outputs: data types of what it reads and writes at run time. nodes: the ONNX nodes it computes.
    """

    name: str
    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: tuple[str, ...]

    @property
    def is_int8_gemm(self) -> bool:
        return self.kind == GEMM and "Int8" in self.inputs

    @property
    def what(self) -> str:
        """For a summary: "Int8 gemm", "Float gemm", "kgen"."""
        if self.kind != GEMM:
            return self.kind
        return " ".join(("Int8" if self.is_int8_gemm else "".join(self.inputs[:1]), GEMM)).strip()


def read_layers(messages: Iterable[str]) -> tuple[Layer, ...]:
    """messages: the compiler's log, VERBOSE included. The table is the message that begins with "Layers:"."""
    rows = (row for text in messages if text.startswith("Layers:") for row in text.splitlines())
    return tuple(layer for layer in map(_layer, rows) if layer)


def _layer(row: str) -> Layer | None:
    found = ROW.match(row)
    if not found:
        return None
    outputs = OUTPUTS.search(row)
    return Layer(
        found["name"],
        found["kind"],
        tuple(DTYPE.findall(found["inputs"])),
        tuple(DTYPE.findall(outputs[1])) if outputs else (),
        tuple(dict.fromkeys(NODE.findall(row))),
    )
