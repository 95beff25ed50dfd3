"""What Triton's ONNX Runtime backend is told of TensorRT: the parameters of its accelerator, and what they cannot say.

The format is of triton-inference-server/onnxruntime_backend (README.md, "Parameter mapping", and LoadModel in
src/onnxruntime.cc): an unknown parameter is an error, and precision_mode is one word, which sets one of the provider's
flags, or for FP32 none.

    float32 with Q/DQ    INT8, trt_int8_enable. The scales are in the graph: a calibration table would be refused
    float32              FP32
    float16              FP16, trt_fp16_enable
    float16 with Q/DQ    cannot be said, it takes both flags: TensorRT, typed weakly as here, refuses Q/DQ without the
                         one and half tensors without the other (microsoft/onnxruntime#13381, NVIDIA/TensorRT#3277)

The provider names what it compiles after the graph's file, inputs and node outputs, not after the weights: in one
folder two checkpoints of an architecture take each other's engines (microsoft/onnxruntime#6455). So each model has its
own, named after what it was made from. It is in /tmp, since a model does not know where its repository lies on the
server, nor whether that may be written; and directly there, since the provider makes one level of folders.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from builders.engine.exports import open_export
from builders.onnx_graph import OnnxGraph
from builders.onnxruntime.providers import profile_shapes
from builders.onnxruntime.record import provider_of
from smoothquant.artifacts.manifest import Manifest, Origin
from smoothquant.errors import UserError

TENSORRT, RTX = "tensorrt", "nv-tensorrt-rtx"  # as in --provider


def check_provider(export: str | Path, activations: str | None, provider: str) -> None:
    """Raise UserError if Triton could not serve an export with this provider. activations: as in `open_export`."""
    found = open_export(export, activations)
    if provider in (TENSORRT, RTX):
        precision_mode(found.folder, OnnxGraph(found.graph), _body(found.origin), provider)


def precision_mode(folder: Path, graph: OnnxGraph, body: str, provider: str) -> str | None:
    """The word for a graph, None without TensorRT. body: "fp32" or "fp16". Raises UserError if there is none."""
    if provider == RTX:
        raise UserError(
            f"{folder}: for --provider {provider}, which Triton's backend does not have",
            expected="--provider cpu, cuda or tensorrt",
        )
    if provider != TENSORRT:
        return None
    quantized = any(True for _ in graph.standard("DequantizeLinear"))
    if quantized and body == "fp16":
        raise UserError(
            f"{folder}: INT8 products in a half-precision body, of which Triton lets --provider {provider} have one",
            expected="a body of fp32",
            do="export with --dtype fp32, or serve this one by smoothquant build tensorrt --triton",
        )
    return "INT8" if quantized else body.upper()


def parameters(engine: Path, name: str, graph: OnnxGraph, manifest: Manifest) -> dict[str, str]:
    """The accelerator's parameters, none without TensorRT. name: of the model; manifest: the engine's."""
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
