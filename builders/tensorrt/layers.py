"""Which matrix products became INT8 kernels, by what TensorRT's engine inspector says.

    {"Layers": [{"Name", "LayerType", "Inputs": [{"Name", "Format/Datatype" or "Datatype"}], "Constants", "Outputs",
                 "TacticName", "Metadata": "[ONNX Layer: A][ONNX Layer: B]"}, ...]}

Metadata names the ONNX nodes that a layer computes, in TensorRT 10 with \u001e between them. A data type is one word
("Int8"), or for layers that TensorRT does not generate a phrase ("Thirty-two wide channel vectorized row major Int8
format"). A matrix kernel is told by its LayerType (gemm, CaskGemmMatrixMultiply, CaskConvolution), or, where that only
says fusion, by its tactic (sm80_xmma_gemm_i8i8_i8i32_f32_tn_n_..._by_fusion_tactic).

A product is INT8 if the matrix kernels that compute it read INT8, in every optimization profile; a layer of another
profile than the first has "[profile N]" in its name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

from builders.onnx_graph import module_of

MATRIX = re.compile(r"gemm|matrix|matmul|gemv|fully|conv|fc", re.IGNORECASE)  # LayerType of matrix kernels
TACTIC = re.compile(r"gemm|xmma|imma", re.IGNORECASE)  # TacticName of matrix kernels
ATTENTION = re.compile(r"mha", re.IGNORECASE)  # TacticName of attention, as in _gemm_mha_v2: two products in one
FLOAT = re.compile(r"f16f16|f32f32|tf32|h\d+gemm|sgemm")  # TacticName of float products, an int8 weight or not
INT8 = re.compile(r"\bint8\b", re.IGNORECASE)  # in a data type
NODE = re.compile(r"\[ONNX Layer: (.*?)\]")
PROFILE = re.compile(r"\[profile (\d+)\]")
DTYPE_KEYS = ("Datatype", "Format/Datatype")  # TensorRT 11, 10


@dataclass(frozen=True)
class Layer:
    """A layer of an engine. inputs: data types that it reads; nodes: of the ONNX graph; profile: its index."""

    name: str
    kind: str
    inputs: tuple[str, ...]
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


@dataclass(frozen=True)
class Product:
    """A quantized matrix product in an engine. module: its linear, or several in one; kernels: what computes it."""

    module: str
    int8: bool
    kernels: tuple[str, ...]
    why: str = ""

    def as_dict(self) -> dict:
        return asdict(self)


def read_layers(inspected: str) -> tuple[Layer, ...]:
    """Layers of an engine. inspected: the inspector's JSON, from an engine with DETAILED verbosity."""
    layers = []
    for row in json.loads(inspected)["Layers"]:
        if not isinstance(row, dict):  # without DETAILED verbosity there are only names
            row = {"Name": row}
        name = row.get("Name", "")
        profile = PROFILE.search(name)
        layers.append(
            Layer(
                name,
                row.get("LayerType", ""),
                tuple(_dtypes(row.get("Inputs", ()))),
                tuple(NODE.findall(row.get("Metadata", ""))),
                row.get("TacticName", ""),
                int(profile[1]) if profile else 0,
            )
        )
    return tuple(layers)


def products(layers: Sequence[Layer], nodes: Iterable[str]) -> tuple[Product, ...]:
    """What became of the quantized products. nodes: their names in the ONNX graph."""
    return tuple(_product(layers, node) for node in nodes)


def _product(layers: Sequence[Layer], node: str) -> Product:
    module = module_of(node)
    named = [layer for layer in layers if node in layer.nodes]
    if not named:
        return Product(module, False, (), "no layer of the engine names it")
    kernels: dict[str, None] = {}
    float_ones: list[Layer] = []
    for profile in sorted({layer.profile for layer in named}):
        here = [layer for layer in named if layer.profile == profile]
        matrix = [layer for layer in here if layer.is_matrix]
        kernels |= dict.fromkeys(layer.tactic or layer.kind for layer in matrix or here)
        if matrix:
            float_ones += [layer for layer in matrix if not layer.is_int8]
        elif not any(layer.is_int8 for layer in here):  # a small product may be one with its epilogue
            float_ones += here
    if float_ones:
        layer = float_ones[0]
        dtypes = ", ".join(dict.fromkeys(layer.inputs)) or "nothing at run time"
        return Product(module, False, tuple(kernels), f"layer {layer.name} ({layer.kind}) reads {dtypes}")
    return Product(module, True, tuple(kernels))


def _dtypes(tensors: Iterable[dict]) -> Iterable[str]:
    for tensor in tensors:
        for key in DTYPE_KEYS:
            if key in tensor:
                yield tensor[key]
                break
