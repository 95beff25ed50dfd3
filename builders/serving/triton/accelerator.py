"""The parameters of TensorRT as an accelerator of Triton's ONNX Runtime backend, and their limits.

The format is that of triton-inference-server/onnxruntime_backend (README.md, "Parameter mapping", and LoadModel in
src/onnxruntime.cc): an unknown parameter is an error, and precision_mode is one word. The word sets one flag of the
provider, or none for FP32.

    float32 with Q/DQ    INT8, trt_int8_enable. The scales are in the graph; a calibration table would be refused
    float32              FP32
    float16              FP16, trt_fp16_enable
    float16 with Q/DQ    no word: it needs both flags. TensorRT, typed weakly as here, refuses Q/DQ without the one and
                         half tensors without the other (microsoft/onnxruntime#13381, NVIDIA/TensorRT#3277)

trt_load_user_initializer, without which the provider takes at most 2 GB (`builders.onnxruntime.providers`), is no
parameter of the backend: it answers "unknown parameter". A larger graph is refused here.

The provider names a compiled engine after the graph's file, inputs and node outputs, not after the weights. In one
folder two checkpoints of an architecture would therefore take each other's engines (microsoft/onnxruntime#6455), so
each model has a folder of its own, named after its inputs. The folder lies in /tmp, since a model does not know where
its repository lies on the server and whether it may be written; and directly there, since the provider makes only one
level of folders.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from builders.engine.exports import open_export
from builders.onnx_graph import OnnxGraph
from builders.onnxruntime.providers import is_large, profile_shapes
from builders.onnxruntime.record import provider_of
from smoothquant.artifacts.manifest import Manifest, Origin
from smoothquant.errors import UserError

TENSORRT, RTX = "tensorrt", "nv-tensorrt-rtx"  # values of --provider


def check_provider(export: str | Path, activations: str | None, provider: str) -> None:
    """Raise UserError if Triton could not serve an export with this provider. activations: the form of the graph, if
    the export holds both."""
    found = open_export(export, activations)
    if provider in (TENSORRT, RTX):
        precision_mode(found.folder, OnnxGraph(found.graph), _body(found.origin), provider)


def precision_mode(folder: Path, graph: OnnxGraph, body: str, provider: str) -> str | None:
    """The precision_mode of a graph; None without TensorRT. body: "fp32" or "fp16".

    Raises UserError if none fits, or if the graph is too large for the backend.
    """
    if provider == RTX:
        raise UserError(
            f"{folder}: Triton's backend has no provider {provider}",
            expected="--provider cpu, cuda or tensorrt",
        )
    if provider != TENSORRT:
        return None
    if is_large(graph.nbytes):
        raise UserError(
            f"{folder}: {graph.nbytes / 1e9:.1f} GB, and Triton's backend gives TensorRT at most 2 GB, since it lacks "
            "the option trt_load_user_initializer",
            expected="a smaller model",
            do="serve it with smoothquant build tensorrt --triton, or leave --triton out",
        )
    quantized = any(True for _ in graph.standard("DequantizeLinear"))
    if quantized and body == "fp16":
        raise UserError(
            f"{folder}: with --provider {provider} Triton runs no INT8 products in a half-precision body",
            expected="a body of fp32",
            do="export with --dtype fp32, or serve this export with smoothquant build tensorrt --triton",
        )
    return "INT8" if quantized else body.upper()


def parameters(engine: Path, name: str, graph: OnnxGraph, manifest: Manifest) -> dict[str, str]:
    """The accelerator's parameters; empty without TensorRT. name: the model's name. manifest: the engine's manifest."""
    provider = provider_of(manifest)
    precision = precision_mode(engine, graph, _body(manifest.origin), provider)
    if precision is None:
        return {}
    least, usual, most = profile_shapes(graph.symbols, manifest.facts.max_positions)
    made_from = hashlib.sha256(json.dumps(manifest.inputs, sort_keys=True).encode()).hexdigest()[:16]
    return {
        "precision_mode": precision,
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": f"/tmp/{name}-{made_from}",
        "trt_profile_min_shapes": least,
        "trt_profile_opt_shapes": usual,
        "trt_profile_max_shapes": most,
    }


def _body(origin: Origin) -> str:
    assert origin.onnx is not None  # of an ONNX export
    return origin.onnx.body
