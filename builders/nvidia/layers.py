"""The layers of an engine, read from TensorRT's table of them, which is JSON or part of the log.

The engine inspector's JSON:

    {"Layers": [{"Name", "LayerType", "Inputs": [{"Name", "Format/Datatype" or "Datatype"}], "Constants", "Outputs",
                 "TacticName", "Metadata": "[ONNX Layer: A][ONNX Layer: B]"}, ...]}

The compiler of TensorRT for RTX logs a row per layer (its inspector needs a GPU, its log does not):

    Name: N, LayerType: gemm, Inputs: [ { ..., Datatype: Int8, ...}], Constants: [...], Outputs: [ { ..., Datatype:
    Float, ...}], TacticName: T, StreamId: 0, Metadata: [ONNX Layer: A][ONNX Layer: B]

Metadata names the ONNX nodes that a layer computes, in TensorRT 10 with \\u001e between them. A data type is one word
("Int8"), or for layers that TensorRT does not generate a phrase ("Thirty-two wide channel vectorized row major Int8
format"). The LayerType tells a matrix kernel (gemm, CaskGemmMatrixMultiply, CaskConvolution). Where the LayerType only
says fusion, the tactic tells it (sm80_xmma_gemm_i8i8_i8i32_f32_tn_n_..._by_fusion_tactic). A layer of a profile other
than the first has "[profile N]" in its name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from smoothquant.errors import UserError
from smoothquant.reading import parse_json

DTypes = tuple[str, ...]

MATRIX = re.compile(r"gemm|matrix|matmul|gemv|fully|conv|fc", re.IGNORECASE)  # the LayerType of a matrix kernel
TACTIC = re.compile(r"gemm|xmma|imma", re.IGNORECASE)  # the TacticName of a matrix kernel
ATTENTION = re.compile(r"mha", re.IGNORECASE)  # the TacticName of attention (_gemm_mha_v2): two products in one
FLOAT = re.compile(r"f16f16|f32f32|tf32|h\d+gemm|sgemm")  # the TacticName of a float product
INT8 = re.compile(r"\bint8\b", re.IGNORECASE)  # in a data type
NODE = re.compile(r"\[ONNX Layer: (.*?)\]")
PROFILE = re.compile(r"\[profile (\d+)\]")
DTYPE_KEYS = ("Datatype", "Format/Datatype")  # TensorRT 11, 10

ROW = re.compile(r"Name: (?P<name>.*?), LayerType: (?P<kind>\w+), Inputs: \[(?P<inputs>.*?)\], (Constants|Outputs): ")
OUTPUTS = re.compile(r"Outputs: \[(?P<outputs>.*?)\], TacticName: (?P<tactic>.*?), ")
DTYPE = re.compile(r"Datatype: (\w+)")


@dataclass(frozen=True)
class EngineLayer:
    """A layer of an engine, usually one kernel.

    kind: gemm (a matrix product), kgen (a generated kernel: norms, activations, attention), or another LayerType.
    inputs, outputs: the data types of the tensors that it reads and writes at run time. nodes: the ONNX nodes that it
    computes. tactic: the name of its kernel. profile: the index of its optimization profile.
    """

    name: str
    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    nodes: tuple[str, ...]
    tactic: str = ""
    profile: int = 0

    @property
    def is_matrix(self) -> bool:
        by_tactic = TACTIC.search(self.tactic) and not ATTENTION.search(self.tactic)
        return bool(MATRIX.search(self.kind) or by_tactic)

    @property
    def is_int8(self) -> bool:
        return any(map(INT8.search, self.inputs)) and not FLOAT.search(self.tactic)

    @property
    def what(self) -> str:
        """The kind of layer for a summary: "Int8 gemm", "Float gemm", "kgen"."""
        if not self.is_matrix:
            return self.kind
        return " ".join(("Int8" if self.is_int8 else "".join(self.inputs[:1]), self.kind)).strip()


def read_layers(inspected: str) -> tuple[EngineLayer, ...]:
    """The layers in the inspector's JSON. The engine must have been built with DETAILED verbosity.

    Raises UserError for a text of another shape.
    """
    try:
        rows = parse_json(inspected)["Layers"]
        return tuple(_from_json(row if isinstance(row, dict) else {"Name": row}) for row in rows)  # else a name
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"TensorRT's table of layers is none ({type(error).__name__}: {error})",
            expected='JSON as in {"Layers": [...]}',
            do="build the engine again",
        ) from error


def read_logged_layers(messages: Iterable[str]) -> tuple[EngineLayer, ...]:
    """The layers in the compiler's log, which must include VERBOSE messages: the table's begins with "Layers:"."""
    rows = (row for text in messages if text.startswith("Layers:") for row in text.splitlines())
    return tuple(_from_log(row, found) for row in rows if (found := ROW.match(row)))


def _from_json(row: Mapping) -> EngineLayer:
    reads, writes = (tuple(filter(None, map(_dtype, row.get(key, ())))) for key in ("Inputs", "Outputs"))
    name, kind, metadata, tactic = (row.get(key, "") for key in ("Name", "LayerType", "Metadata", "TacticName"))
    return _layer(name, kind, reads, writes, metadata, tactic)


def _from_log(row: str, found: re.Match) -> EngineLayer:
    behind = OUTPUTS.search(row)
    outputs, tactic = (behind["outputs"], behind["tactic"]) if behind else ("", "")
    reads, writes = (tuple(DTYPE.findall(text)) for text in (found["inputs"], outputs))
    return _layer(found["name"], found["kind"], reads, writes, row, tactic)


def _layer(name: str, kind: str, reads: DTypes, writes: DTypes, metadata: str, tactic: str) -> EngineLayer:
    profile, nodes = PROFILE.search(name), tuple(dict.fromkeys(NODE.findall(metadata)))
    return EngineLayer(name, kind, reads, writes, nodes, tactic, int(profile[1]) if profile else 0)


def _dtype(tensor: Mapping) -> str:
    return next((tensor[key] for key in DTYPE_KEYS if key in tensor), "")
