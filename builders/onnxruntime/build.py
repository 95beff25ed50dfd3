"""An ONNX Runtime engine folder out of an ONNX export.

    model.onnx, model.onnx.data     linked from the export where the disk allows, else copied
    config.json, tokenizer files    for `smoothquant generate`, onnxruntime-genai, optimum
    genai_config.json               for onnxruntime-genai
    smoothing.safetensors           for validation
    manifest.json                   the export's inputs, threads, and how many linears became integer kernels

Before the folder gets its name, the graph is loaded and run once: the logits must be finite and every quantized
matrix product must have become an integer kernel.
"""

from __future__ import annotations

import hashlib
import platform
from pathlib import Path

import numpy

from builders.onnxruntime.genai import write_genai_config
from builders.onnxruntime.providers import check_available, find_provider
from builders.onnxruntime.session import MODEL, operators_run
from smoothquant.errors import UserError
from smoothquant.machine import physical_cores
from smoothquant.packages import require
from smoothquant.workspace import Workspace, load_manifest

STEP = "build onnxruntime"
INTEGER_KERNEL = "MatMulIntegerToFloat"
FUSES = ("x86_64", "amd64")  # where ONNX Runtime has the fused kernel


def build(export: str | Path, out: str | Path, *, provider: str = "cpu", overwrite: bool = False) -> dict:
    """Make the engine folder `out` from the folder `export`. Returns its manifest. provider: where it is to run.

    Raises UserError if `export` is no whole ONNX export, if ONNX Runtime refuses the graph, if a logit is not finite,
    or if a quantized linear did not become an integer kernel; MissingPackageError without onnxruntime or the provider.
    """
    export, out = Path(export), Path(out)
    check_available(find_provider(provider))
    made = load_manifest(export)
    if made["step"] != "export onnx":
        raise UserError(
            f"{export}: made by {made['step']!r}", expected="an ONNX export", do="smoothquant export onnx MODEL ..."
        )
    if made["inputs"]["body"] == "bf16":
        raise UserError(
            f"{export}: a bfloat16 graph, for which ONNX Runtime lacks operators",
            expected="a body of fp32 or fp16",
            do="export with --dtype fp32 or fp16; bf16 is for TensorRT",
        )
    threads = physical_cores()
    graph = hashlib.sha256((export / MODEL).read_bytes()).hexdigest()[:16]  # a newer exporter may draw another one
    inputs = {"export": made["inputs"], "graph": graph, "threads": threads}
    if provider != "cpu":
        inputs["provider"] = provider
    with Workspace(out, STEP, inputs, overwrite=overwrite) as work:
        if not work.finished:
            for name in made["files"]:
                work.adopt(export / name)
            write_genai_config(work.folder, made["geometry"], threads, provider)
            kernels = _check(export, made["geometry"]["vocab_size"], provider)
            work.commit({"contract": made["contract"], "geometry": made["geometry"], "kernels": kernels})
    return load_manifest(out)


def _check(export: Path, vocab_size: int, provider: str) -> dict[str, int]:
    """Run the graph once. Returns how many integer kernels it has, and how many it should have.

    Only the CPU's provider shows its kernels; what others do with Q/DQ is theirs (`providers`).
    """
    ids = numpy.arange(4, dtype=numpy.int64)[None] % vocab_size
    ran, logits = operators_run(export, ids, provider)
    if not numpy.isfinite(logits).all():
        raise UserError(
            f"{export}: the graph gives logits that are not finite",
            expected="finite logits",
            do="export with --dtype fp32, or validate the float model first",
        )
    expected = quantized_products(export)
    kernels = {"integer": ran[INTEGER_KERNEL], "quantized": expected}
    if provider == "cpu" and platform.machine().lower() in FUSES and ran[INTEGER_KERNEL] != expected:
        raise UserError(
            f"{export}: ONNX Runtime made {ran[INTEGER_KERNEL]} integer kernels",
            expected=f"{expected}, one per quantized matrix product",
            do="use onnxruntime >= 1.20, or report this export",
        )
    return kernels


def quantized_products(export: Path) -> int:
    """Matrix products of a graph that have an int8 weight: each has its own."""
    graph = require("onnx").load(str(export / MODEL), load_external_data=False).graph
    return sum(initializer.name.endswith("weight_int8") for initializer in graph.initializer)
