"""Versions of TensorRT-LLM that build engines with SmoothQuant, what they are called and what they want.

    0.20 .. 1.2.1     stable versions with `trtllm-build`; from 1.0 on, PyTorch is the default backend of the tools
    1.3.0rc20         the last version with it (TensorRT-LLM's docs/source/legacy/tensorrt-backend-removal.md)

The options of `trtllm-build` that matter here are the same in all of them: `cli_plugin_args` of
tensorrt_llm/plugin/plugin.py, and tensorrt_llm/commands/build.py. The SmoothQuant plugins themselves (GEMM, norm,
per-token and per-tensor quantization) are no options there: the builder switches them on by the checkpoint's
quant_algo (tensorrt_llm/builder.py, `set_smooth_quant_plugins`).
"""

from __future__ import annotations

from collections.abc import Mapping

from packaging.version import InvalidVersion, Version

FIRST, LAST, STABLE = "0.20.0", "1.3.0rc20", "1.2.1"
PYTORCH_DEFAULT = Version("1.0.0")  # from here on, trtllm-serve must be told that MODEL is an engine
IMAGE = "nvcr.io/nvidia/tensorrt-llm/release"
TRITON_IMAGE = "nvcr.io/nvidia/tritonserver:{}-trtllm-python-py3"
TRITON: Mapping[str, str] = {  # version -> newest Triton image that holds it, by NVIDIA's compatibility matrix
    "0.20.0": "25.07",
    "0.21.0": "25.08",
    "1.0.0": "25.10",
    "1.0.3.2510": "25.11",
    "1.1.0": "25.12",
}
NO_SMOOTHQUANT = range(100, 120)  # compute capability x 10 that builder.py refuses: Blackwell of data centres


def builds_engines(version: str) -> bool:
    """Whether a version of TensorRT-LLM builds SmoothQuant engines."""
    try:
        return Version(FIRST) <= Version(version) <= Version(LAST)
    except InvalidVersion:
        return False


def triton_image(version: str) -> str | None:
    """The Triton image with this version of TensorRT-LLM; None where NVIDIA lists none."""
    tag = next((tag for known, tag in TRITON.items() if Version(known) == Version(version)), None)
    return TRITON_IMAGE.format(tag) if tag else None


def serve_backend(version: str) -> tuple[str, ...]:
    """What trtllm-serve is told about an engine: "trt" is the older name of "tensorrt", and still understood."""
    return ("--backend", "trt") if Version(version) >= PYTORCH_DEFAULT else ()
