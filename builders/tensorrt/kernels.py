"""Find the matrix products that became INT8 kernels, from the table of TensorRT's engine inspector.

A product is INT8 if the matrix kernels that compute it read INT8, in every optimization profile.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from builders.nvidia.layers import EngineLayer
from builders.onnx_graph import module_of


@dataclass(frozen=True)
class BuiltProduct:
    """A quantized matrix product in an engine.

    module: its linear, or several linears in one. int8: whether INT8 kernels compute it. kernels: the names of its
    kernels. why: the reason if it is not INT8.
    """

    module: str
    int8: bool
    kernels: tuple[str, ...]
    why: str = ""


def built_products(layers: Sequence[EngineLayer], nodes: Iterable[str]) -> tuple[BuiltProduct, ...]:
    """The quantized products of an engine. nodes: the names of their nodes in the ONNX graph."""
    return tuple(_product(layers, node) for node in nodes)


def _product(layers: Sequence[EngineLayer], node: str) -> BuiltProduct:
    module = module_of(node)
    named = [layer for layer in layers if node in layer.nodes]
    if not named:
        return BuiltProduct(module, False, (), "no layer of the engine names it")
    kernels: dict[str, None] = {}
    float_ones: list[EngineLayer] = []
    for profile in sorted({layer.profile for layer in named}):
        here = [layer for layer in named if layer.profile == profile]
        matrix = [layer for layer in here if layer.is_matrix]
        kernels |= dict.fromkeys(layer.tactic or layer.kind for layer in matrix or here)
        if matrix:
            float_ones += [layer for layer in matrix if not layer.is_int8]
        elif not any(layer.is_int8 for layer in here):  # a small product may share a kernel with its epilogue
            float_ones += here
    if float_ones:
        layer = float_ones[0]
        dtypes = ", ".join(dict.fromkeys(layer.inputs)) or "nothing at run time"
        return BuiltProduct(module, False, tuple(kernels), f"layer {layer.name} ({layer.kind}) reads {dtypes}")
    return BuiltProduct(module, True, tuple(kernels))
