"""Build an ONNX Runtime engine folder from an ONNX export.

    model.onnx, model.onnx.data     linked from the export if the disk allows, or else copied; or model.onnx with
                                    grouped attention (`grouped`)
    config.json, tokenizer files    for `smoothquant generate`, onnxruntime-genai, optimum
    genai_config.json               for onnxruntime-genai, which knows no cache that is written in place
    smoothquant/smoothing.safetensors   for validation
    smoothquant/manifest.json       the export's inputs, threads, and the number of integer kernels

Before the folder gets its name, the graph is loaded and run once: the logits must be finite and every quantized
matrix product must have become an integer kernel. Whether such kernels are exact on this processor is found out first.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy

from builders.check.lint import products_to_run
from builders.engine.exports import open_export
from builders.engine.kernels import IntegerKernels, check_kernels, check_logits
from builders.engine.saturation import check_exact
from builders.onnx_graph import OnnxGraph
from builders.onnxruntime.genai import GENAI, genai_config
from builders.onnxruntime.grouped import grouped_graph
from builders.onnxruntime.providers import TENSORRT, check_available, check_size, find_provider
from builders.onnxruntime.record import (
    CPU,
    GROUPED,
    STANDARD,
    STEP,
    OnnxRuntimeInputs,
    OnnxRuntimeResults,
)
from builders.onnxruntime.session import check_body, check_in_place, operators_run, run_product
from smoothquant.artifacts.manifest import Manifest
from smoothquant.artifacts.ports import MODEL
from smoothquant.artifacts.record import as_json
from smoothquant.errors import UserError
from smoothquant.files import write_bytes, write_json
from smoothquant.machine import physical_cores
from smoothquant.outputs import check_content, load_manifest
from smoothquant.workspace import Workspace

INTEGER_KERNEL = "MatMulIntegerToFloat"


def build(
    export: str | Path,
    out: str | Path,
    *,
    activations: str | None = None,
    provider: str = CPU,
    attention: str = STANDARD,
    overwrite: bool = False,
) -> Manifest:
    """Make the engine folder `out` from the folder `export`. Returns its manifest.

    activations: the form of the graph, if the export holds both. provider: the provider that will run the engine.
    attention: a form of `record.ATTENTION`.

    Raises UserError if `export` is not a whole ONNX export, if ONNX Runtime refuses the graph, if a logit is not
    finite, or if a quantized linear did not become an integer kernel; MissingPackageError without onnxruntime or the
    provider.
    """
    out = Path(out)
    chosen = find_provider(provider)
    if attention == GROUPED and provider != CPU:
        raise UserError(
            f"grouped attention on {provider}", expected="the provider cpu", do="build it with --attention standard"
        )
    check_available(chosen)
    found = open_export(export, activations)
    made = found.manifest
    check_content(found.folder, made)
    if chosen.tensorrt:
        found.check_for_tensorrt()
    if chosen.execution_provider == TENSORRT:
        check_size(found.folder, OnnxGraph(found.graph).nbytes)
    check_body(found.folder, found.origin)
    check_in_place(found.folder, found.origin, provider, attention)
    if provider == CPU and (found.origin.scheme.quantized or found.origin.scheme.head.quantized):
        check_exact("ONNX Runtime", run_product, "use onnxruntime >= 1.20, or report this processor")
    threads = physical_cores()
    inputs = OnnxRuntimeInputs(found.origin, found.digest, threads, provider, attention).as_json()
    with Workspace(out, STEP, inputs, overwrite=overwrite) as work:
        if not work.finished:
            for name in found.files:
                work.adopt(found.folder / name, name)
            grouped = attention == GROUPED
            if grouped:
                write_bytes(work.path(MODEL), grouped_graph(found.graph, made.facts.max_positions).SerializeToString())
            else:
                work.adopt(found.graph, MODEL)
            if found.capacity is None:  # onnxruntime-genai knows no write_indices
                write_json(work.path(GENAI), genai_config(work.folder, made.facts, threads, provider, shared=grouped))
            whole = found.graph.name == MODEL and not grouped
            running = found.folder if whole else work.folder  # errors name the user's own folder
            kernels = _check(running, replace(made, inputs=inputs), provider)
            work.commit(as_json(OnnxRuntimeResults(kernels)), contract=made.contract, geometry=made.geometry)
    return load_manifest(out)


def _check(folder: Path, manifest: Manifest, provider: str) -> IntegerKernels:
    """Run the graph once. Returns the number of integer kernels that it has and should have.

    manifest: the engine's manifest. Only the CPU's provider shows its kernels. The other providers choose their own way
    to compute Q/DQ (`providers`).
    """
    ids = numpy.arange(4, dtype=numpy.int64)[None] % manifest.facts.vocab_size
    ran, logits = operators_run(folder, ids, provider, manifest)
    check_logits(folder, logits)
    kernels = IntegerKernels(ran[INTEGER_KERNEL], len(products_to_run(folder)))
    if provider == CPU:
        check_kernels(folder, "ONNX Runtime", kernels, "use onnxruntime >= 1.20, or report this export")
    return kernels
