"""Build a TensorRT engine folder from an ONNX export.

    model.plan                      TensorRT's engine, for this GPU and this version
    smoothquant/layers.json         every layer by the engine inspector: kernels, data types, ONNX nodes
    config.json, tokenizer files    for `smoothquant generate`
    smoothquant/smoothing.safetensors   for validation
    smoothquant/manifest.json       the export's inputs, limits, options, GPU, version, and the INT8 products

A float export gives a float engine, with which the speed of an INT8 engine is compared.

Before the folder gets its name, the plan is loaded and run once: the logits must be finite.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from builders.check.lint import Product, lint, quantized_products
from builders.engine.exports import OnnxExport, open_export
from builders.nvidia.layers import read_layers
from builders.onnx_graph import OnnxGraph
from builders.tensorrt import hardware, timing
from builders.tensorrt.compiler import Options, compile_graph
from builders.tensorrt.engine import PLAN
from builders.tensorrt.kernels import built_products
from builders.tensorrt.limits import Limits, limits_for
from builders.tensorrt.record import STEP, BuiltOn, Int8Kernels, StoredPort, TensorRTInputs, TensorRTResults
from builders.tensorrt.runtime import LoadedPlan, Port
from builders.tensorrt.session import Session
from smoothquant.artifacts.manifest import Manifest
from smoothquant.artifacts.ports import MODEL
from smoothquant.artifacts.record import as_json
from smoothquant.errors import UserError
from smoothquant.files import write_bytes, write_text
from smoothquant.outputs import OURS, check_content, load_manifest
from smoothquant.scheme import Scheme
from smoothquant.workspace import Workspace

LAYERS = f"{OURS}/layers.json"


def build(
    export: str | Path,
    out: str | Path,
    limits: Mapping[str, int | None] | None = None,
    options: Options = Options(),  # noqa: B008 (frozen)
    *,
    timing_cache: str | Path | None = None,
    overwrite: bool = False,
    activations: str | None = None,
    fp32: bool = True,
    progress: Callable[[int, int], None] = lambda done, total: None,
    warn: Callable[[str], None] = lambda text: None,
) -> Manifest:
    """Make the engine folder `out` from the folder `export`, on the GPU that will run it. Returns its manifest.

    limits: the sizes that the engine must take, under the argument names of `limits_for`; absent ones have a default.
    timing_cache: a file that makes the next build quicker. activations: the form of the graph, if the export holds
    both. fp32: whether a float32 body is built, too. warn: called with each fault that leaves the engine whole; the
    manifest lists these warnings, too.

    Raises UserError if `export` is not a whole ONNX export, if the linter finds a fault in it, if its body is float32
    and that is not asked for, if the limits contradict the model's, if TensorRT refuses the graph or builds nothing, or
    if a logit is not finite; OutputError if a file cannot be written; MissingPackageError without TensorRT or a GPU.
    """
    out, found = Path(out), open_export(export, activations)
    made = found.manifest
    check_content(found.folder, made)
    found.check_for_tensorrt()
    held = limits_for(made.facts, capacity=found.capacity, **(limits or {}))
    graph = OnnxGraph(found.graph)
    quantized = _products(graph, found.origin.scheme)
    version, gpu = hardware.require_tensorrt(), hardware.find_gpu()
    hardware.check_sums(graph, version)
    if not fp32:
        _check_half(found)
    inputs = TensorRTInputs(found.origin, found.digest, held, options, BuiltOn(version, gpu.name, gpu.capability))
    with Workspace(out, STEP, as_json(inputs), overwrite=overwrite) as work:
        if not work.finished:
            cache = Path(timing_cache) if timing_cache else None
            if cache:
                timing.check(cache)
            work.require(made.nbytes)
            for name in found.files:
                if not name.startswith(MODEL):  # the plan holds the graph and the weights
                    work.adopt(found.folder / name, name)
            compiled = compile_graph(
                found.graph,
                held.profiles,
                options,
                timing_cache=cache,
                prepare=gpu.select,
                progress=progress,
            )
            write_bytes(work.path(PLAN), memoryview(compiled.plan))
            if compiled.unsaved:
                warn(compiled.unsaved)
            plan = LoadedPlan(
                compiled.plan, str(out), gpu, trusted=options.version_compatible, streaming=options.weight_streaming
            )
            kernels = _kernels(plan, work.path(LAYERS), [product.name for product in quantized])
            _check(found.folder, plan, held, made.facts.vocab_size)
            warnings = (*compiled.warnings, *filter(None, [compiled.unsaved]))
            results = TensorRTResults(tuple(map(_stored, plan.ports.values())), kernels, warnings)
            work.commit(as_json(results), contract=made.contract, geometry=made.geometry)
    return load_manifest(out)


def _check_half(export: OnnxExport) -> None:
    """Raise UserError if what is not INT8 is float32."""
    onnx = export.origin.onnx
    if onnx is not None and onnx.body == "fp32":
        raise UserError(
            f"{export.folder}: all that is not INT8 is float32 there: norms, attention, head and cache, of twice the "
            "bytes of half precision",
            expected="a body of fp16 or bf16",
            do="export with smoothquant export onnx --for tensorrt, or build it as it is with --fp32",
        )


def _products(graph: OnnxGraph, scheme: Scheme) -> list[Product]:
    """The quantized products of a graph in which the linter finds no fault."""
    for finding in lint(graph):
        if finding.effect.is_error and (scheme.quantized or finding.rule != "no-quantization"):
            where = "" if finding.node == graph.path.name else f"{finding.module}: "
            raise UserError(f"{graph.path}: {where}{finding.what}", do=finding.do)
    return quantized_products(graph)


def _kernels(plan: LoadedPlan, layers: Path, nodes: Sequence[str]) -> Int8Kernels:
    """Write the inspector's layers to a file. Returns which quantized products are INT8."""
    inspected = plan.layers()
    write_text(layers, inspected)
    found = built_products(read_layers(inspected), nodes)
    return Int8Kernels(sum(product.int8 for product in found), len(found), found)


def _stored(port: Port) -> StoredPort:
    return StoredPort(port.name, str(port.dtype).removeprefix("torch."), port.shape, port.is_input)


def _check(export: Path, plan: LoadedPlan, limits: Limits, vocab_size: int) -> None:
    ids = torch.arange(min(4, limits.length))[None] % vocab_size
    if not Session(plan, limits).logits(ids).isfinite().all():
        raise UserError(
            f"{export}: the engine gives logits that are not finite",
            expected="finite logits",
            do="export with --dtype fp32, or validate the export in ONNX Runtime first",
        )
