"""Read an ONNX export for OpenVINO, and compile it with settings that suit the machine.

The graph on the disk stays as it was exported. In memory it gets three changes:

    logits_to_keep     becomes an input: OpenVINO's ONNX reader takes an input with a default value for a constant
    past, present      become variables, which the runtime keeps from one run to the next (a stateful model)
    casts to bfloat16  and back become products and differences that round alike (Veltkamp's splitting): OpenVINO leaves
                       such casts away, and some families (Falcon RW) round their ALiBi so

Attention stays as written, products and softmax. OpenVINO's own operator for it, which can hold the cache, was slower:
1.28 times in a prompt of 1024 tokens, for a gain of 6 % in a step behind it.

Everything but quantized products computes in float32, whatever the processor has. By default OpenVINO would round the
inputs of float products to 8 bits in groups, and the cache of its own attention, too; nobody has asked for that.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy

from builders.openvino.package import require_openvino, version_of
from smoothquant.artifacts.ports import LOGITS_TO_KEEP, MODEL, PRESENT, past_of
from smoothquant.errors import UserError, raise_refusal
from smoothquant.machine import physical_cores
from smoothquant.packages import require

DEVICE = "CPU"
SETTINGS = {
    "PERFORMANCE_HINT": "LATENCY",
    "INFERENCE_PRECISION_HINT": "f32",
    "KV_CACHE_PRECISION": "f32",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
    "ENABLE_CPU_PINNING": False,  # others use the cores, too
}
SPLIT = 2.0**16 + 1  # Veltkamp's constant: of 24 significant bits, 8 stay
PRODUCTS = ("FullyConnected", "MatMul")  # OpenVINO's names of matrix products
INTEGERS = ("i8", "u8")


@dataclass(frozen=True)
class MatrixProduct:
    """One matrix product of a compiled graph. integer: whether it computes in INT8. nodes: the names of the ONNX nodes
    that it was made from."""

    integer: bool
    nodes: tuple[str, ...]


@dataclass(frozen=True)
class CompiledGraph:
    """A graph that runs. model: OpenVINO's compiled model. keeps: whether it has the input `logits_to_keep`, which
    earlier exports lack."""

    folder: Path
    model: Any
    keeps: bool

    def products(self) -> Iterator[MatrixProduct]:
        """Yield the matrix products, as they run. The type of the primitive tells: OpenVINO's `runtimePrecision` is i8,
        too, where a float kernel reads int8 weights."""
        for node in self.model.get_runtime_model().get_ops():
            facts = {key: getattr(value, "value", value) for key, value in node.get_rt_info().items()}
            if facts["layerType"] in PRODUCTS:
                nodes = tuple(facts["originalLayersNames"].split(","))
                yield MatrixProduct(facts["primitiveType"].rpartition("_")[2] in INTEGERS, nodes)


def compile_graph(folder: Path, threads: int | None = None) -> CompiledGraph:
    """Compile `folder/model.onnx`. threads: by default the number of physical cores.

    Raises UserError if OpenVINO refuses the graph, MissingPackageError if it is missing or too old.
    """
    openvino = require_openvino()
    try:
        core = openvino.Core()
        graph = core.read_model(folder / MODEL)
        keeps = _open_logits_to_keep(graph)
        _round_to_bfloat16(graph)
        _keep_cache(graph)
        settings = {**SETTINGS, "INFERENCE_NUM_THREADS": threads or physical_cores()}
        return CompiledGraph(folder, core.compile_model(graph, DEVICE, settings), keeps)
    except RuntimeError as error:  # the one class that openvino raises
        raise_refusal(error, folder)
        raise refused(folder, error) from error


def run_product(folder: Path, x: numpy.ndarray) -> numpy.ndarray:
    """The output of the graph in a folder that has one input, x, as `compile_graph` compiles it."""
    return compile_graph(folder).model([x])[0]


def refused(folder: Path, error: RuntimeError) -> UserError:
    """The error of a graph that OpenVINO does not take. error: OpenVINO's, whose last line has the reason."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return UserError(
        f"{folder / MODEL}: OpenVINO {version_of(require_openvino())} refuses the graph ({lines[-1] if lines else ''})",
        expected="a graph made by smoothquant export onnx",
        do="make the export again",
    )


def _open_logits_to_keep(graph: Any) -> bool:
    """Make an input of the constant `logits_to_keep`. Returns whether there is one."""
    operators = require("openvino.opset13")
    for node in graph.get_ops():
        if node.get_type_name() == "Constant" and LOGITS_TO_KEEP in node.output(0).get_names():
            given = operators.parameter([1], numpy.int64, name=LOGITS_TO_KEEP)
            given.output(0).set_names({LOGITS_TO_KEEP})
            node.output(0).replace(given.output(0))
            graph.add_parameters([given])
            return True
    return False


def _round_to_bfloat16(graph: Any) -> None:
    """Round float32 values in float32 where the graph casts them to bfloat16 and back."""
    operators = require("openvino.opset13")
    for node in graph.get_ops():
        if (
            node.get_type_name() == "Convert"
            and node.input_value(0).get_element_type().get_type_name() == "f32"
            and node.get_output_element_type(0).get_type_name() == "bf16"
        ):
            value = node.input_value(0)
            large = operators.multiply(value, operators.constant(SPLIT, numpy.float32))
            rounded = operators.subtract(large, operators.subtract(large, value))
            for reader in node.output(0).get_target_inputs():
                back = reader.get_node()
                if back.get_type_name() == "Convert" and back.get_output_element_type(0).get_type_name() == "f32":
                    back.output(0).replace(rounded.output(0))


def _keep_cache(graph: Any) -> None:
    """Make variables of the pairs of past and present."""
    passes = require("openvino.passes")
    outputs = [name for output in graph.outputs for name in output.get_names() if name.startswith(PRESENT)]
    manager = passes.Manager()
    manager.register_pass(passes.MakeStateful({past_of(name): name for name in outputs}))
    manager.run_passes(graph)
