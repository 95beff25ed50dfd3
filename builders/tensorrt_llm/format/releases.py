"""Facts about the versions of TensorRT-LLM that build engines: GPUs, Triton images, and options of its server.

`exporters.trtllm.versions` lists the versions. The options of `trtllm-build` that matter here are the same in all of
them: `cli_plugin_args` of tensorrt_llm/plugin/plugin.py, and tensorrt_llm/commands/build.py. The SmoothQuant plugins
themselves (GEMM, norm, per-token and per-tensor quantization) have no options there: the builder switches them on by
the checkpoint's quant_algo (tensorrt_llm/builder.py, `set_smooth_quant_plugins`).

    compute capability
    7.5           no SmoothQuant, by the support matrices up to 0.12; later ones do not list Turing
    8.0 to 9.0    the INT8 kernels of Ampere (int8_gemm_template.h, dispatchToArch), on Ada and Hopper too
    10.0 to 11.9  builder.py refuses them: "SmoothQuant is not supported on SM>=100"
    from 12.0 on  builder.py accepts them; later sources of dispatchToArch use the kernels of Ampere
"""

from __future__ import annotations

from collections.abc import Mapping

from packaging.version import Version

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
LISTED, UNLISTED = (
    range(80, 91),
    120,
)  # 10 x compute capability: with kernels in every version; with kernels from here on


def has_kernels(capability: str) -> bool:
    """Whether some version has SmoothQuant kernels for a GPU. capability: "8.0", as nvidia-smi prints it."""
    return is_listed(capability) or round(float(capability) * 10) >= UNLISTED


def is_listed(capability: str) -> bool:
    """Whether every version has SmoothQuant kernels for a GPU. capability: "8.0", as nvidia-smi prints it."""
    return round(float(capability) * 10) in LISTED


def triton_image(version: str) -> str | None:
    """The Triton image with this version of TensorRT-LLM; None if NVIDIA lists none."""
    tag = next((tag for known, tag in TRITON.items() if Version(known) == Version(version)), None)
    return TRITON_IMAGE.format(tag) if tag else None


def serve_backend(version: str) -> tuple[str, ...]:
    """The options that make trtllm-serve read an engine. "trt" is the older name of "tensorrt", which all versions
    know."""
    return ("--backend", "trt") if Version(version) >= PYTORCH_DEFAULT else ()
