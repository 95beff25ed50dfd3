"""What the versions of TensorRT-LLM that build engines are called and want, and the GPUs that they build them for.

Which versions those are: `exporters.trtllm.versions`. The options of `trtllm-build` that matter here are the same in
all of them: `cli_plugin_args` of tensorrt_llm/plugin/plugin.py, and tensorrt_llm/commands/build.py. The SmoothQuant
plugins themselves (GEMM, norm, per-token and per-tensor quantization) are no options there: the builder switches them
on by the checkpoint's quant_algo (tensorrt_llm/builder.py, `set_smooth_quant_plugins`).

    compute capability
    7.5           no SmoothQuant, by the support matrix up to 0.12; Turing is in none since
    8.0 to 9.0    the INT8 kernels of Ampere (int8_gemm_template.h, dispatchToArch), on Ada and Hopper too
    10.0 to 11.9  refused by builder.py: "SmoothQuant is not supported on SM>=100"
    from 12.0 on  let through by builder.py, and given Ampere's kernels by later sources of dispatchToArch
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
LISTED, UNLISTED = range(80, 91), 120  # compute capability x 10, of the table above: the kernels' own; from there on


def has_kernels(capability: str) -> bool:
    """Whether TensorRT-LLM has SmoothQuant kernels for a GPU. capability: as nvidia-smi says it, "8.0"."""
    return is_listed(capability) or round(float(capability) * 10) >= UNLISTED


def is_listed(capability: str) -> bool:
    """Whether every version has them."""
    return round(float(capability) * 10) in LISTED


def triton_image(version: str) -> str | None:
    """The Triton image with this version of TensorRT-LLM; None where NVIDIA lists none."""
    tag = next((tag for known, tag in TRITON.items() if Version(known) == Version(version)), None)
    return TRITON_IMAGE.format(tag) if tag else None


def serve_backend(version: str) -> tuple[str, ...]:
    """What trtllm-serve is told about an engine: "trt" is the older name of "tensorrt", and still understood."""
    return ("--backend", "trt") if Version(version) >= PYTORCH_DEFAULT else ()
