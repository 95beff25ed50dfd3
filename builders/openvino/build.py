"""Build an OpenVINO engine folder from an ONNX export.

    model.onnx, model.onnx.data     linked from the export if the disk allows, or else copied
    config.json, tokenizer files    for `smoothquant generate`
    smoothquant/smoothing.safetensors   for validation
    smoothquant/manifest.json       the export's inputs, OpenVINO's version, the processor's integer instructions,
                                    threads, and the number of integer kernels

OpenVINO compiles the graph when the engine is opened. Before the folder gets its name, the graph is compiled and run
once: the logits must be finite, and every quantized matrix product must have become an integer kernel. Whether such
kernels are exact on this processor is found out first.
"""

from __future__ import annotations

from pathlib import Path

import numpy

from builders.check.lint import Product, products_to_run
from builders.engine.exports import OnnxExport, check_grown, open_export
from builders.engine.kernels import IntegerKernels, check_kernels, check_logits
from builders.engine.saturation import check_exact
from builders.openvino.engine import OpenVinoRequest
from builders.openvino.graph import CompiledGraph, compile_graph, run_product
from builders.openvino.package import LEAST, require_openvino, version_of
from builders.openvino.record import STEP, OpenVinoInputs, OpenVinoResults
from smoothquant.artifacts.manifest import Manifest, ModelFacts
from smoothquant.artifacts.ports import MODEL
from smoothquant.artifacts.record import as_json
from smoothquant.errors import UserError
from smoothquant.machine import cpu_flags, int8_flag, physical_cores
from smoothquant.outputs import check_content, load_manifest
from smoothquant.packages import require
from smoothquant.workspace import Workspace


def build(export: str | Path, out: str | Path, *, activations: str | None = None, overwrite: bool = False) -> Manifest:
    """Make the engine folder `out` from the folder `export`. Returns its manifest.

    activations: the form of the graph, if the export holds both.

    Raises UserError if `export` is not a whole ONNX export, if OpenVINO refuses the graph, if a logit is not finite, or
    if a quantized linear did not become an integer kernel; MissingPackageError without onnx, or without an OpenVINO
    that is new enough.
    """
    require("onnx")
    version = version_of(require_openvino())
    found = open_export(export, activations)
    made = found.manifest
    check_content(found.folder, made)
    _check_body(found)
    check_grown(found.folder, found.origin, f"OpenVINO {version}")  # it has no TensorScatter
    if found.origin.scheme.quantized or found.origin.scheme.head.quantized:
        check_exact(f"OpenVINO {version}", run_product, "build for ONNX Runtime here: smoothquant build onnxruntime")
    inputs = as_json(OpenVinoInputs(found.origin, found.digest, physical_cores(), version, int8_flag(cpu_flags())))
    with Workspace(Path(out), STEP, inputs, overwrite=overwrite) as work:
        if not work.finished:
            for name in found.files:
                work.adopt(found.folder / name, name)
            work.adopt(found.graph, MODEL)
            running = found.folder if found.graph.name == MODEL else work.folder  # errors name the user's own folder
            kernels = _check(running, made.facts)
            work.commit(as_json(OpenVinoResults(kernels)), contract=made.contract, geometry=made.geometry)
    return load_manifest(out)


def _check_body(found: OnnxExport) -> None:
    """Raise UserError for a body that OpenVINO does not compute as it is written."""
    if found.origin.onnx is not None and found.origin.onnx.body == "bf16":
        raise UserError(
            f"{found.folder}: OpenVINO computes a bfloat16 graph in float32",
            expected="a body of fp32 or fp16",
            do="export with --dtype fp32 or fp16; bf16 is for TensorRT",
        )


def _check(folder: Path, facts: ModelFacts) -> IntegerKernels:
    """Run the graph once. Returns the number of integer kernels that it has and should have."""
    products = products_to_run(folder)
    graph = compile_graph(folder)
    ids = numpy.arange(4, dtype=numpy.int64)[None] % facts.vocab_size
    check_logits(folder, OpenVinoRequest(graph, 1).run(ids, keep=0))
    kernels = IntegerKernels(sum(product.integer for product in graph.products()), len(products))
    do = f"use the newest openvino (at least {LEAST}), or report this export"
    check_kernels(folder, "OpenVINO", kernels, do, _in_float(products, graph))
    return kernels


def _in_float(products: list[Product], graph: CompiledGraph) -> list[str]:
    """The quantized products that run in float, by their modules."""
    float_nodes = {name for product in graph.products() if not product.integer for name in product.nodes}
    return [product.module for product in products if product.name in float_nodes]
