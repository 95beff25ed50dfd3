"""The execution providers of ONNX Runtime, and their way to compute Q/DQ.

cpu               every quantized product is one integer kernel
cuda              Q/DQ runs as float: the right logits (fake quantization), but no INT8 speed and no less memory
tensorrt          TensorRT 10 (libnvinfer.so.10), weakly typed: INT8 kernels where TensorRT finds them quicker
nv-tensorrt-rtx   TensorRT for RTX, strongly typed: INT8 kernels; RTX GPUs only, no A100 or H100

A provider that fails to load is an error here; ONNX Runtime itself would go on with the next one, ten times slower.

The provider tensorrt gives TensorRT's parser the graph with its weights as one protobuf message, which cannot hold
2 GiB. With trt_load_user_initializer it keeps the weights out of the message; ONNX Runtime has that from 1.23 on, with
TensorRT 10.13 (microsoft/onnxruntime#25409).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from packaging.version import Version

from builders.nvidia.profiles import single_profile
from smoothquant import cache
from smoothquant.errors import MissingPackageError, UserError
from smoothquant.files import make_folder
from smoothquant.packages import require

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
TENSORRT, RTX = "TensorrtExecutionProvider", "NvTensorRTRTXExecutionProvider"
RTX_PACKAGE, RTX_MODULE = "onnxruntime-ep-nv-tensorrt-rtx-cu13", "onnxruntime_ep_nv_tensorrt_rtx"
LONGEST_PROFILE = 2048
LARGEST_MESSAGE = 2_000_000_000  # bytes; protobuf's limit is 2**31 - 1, and ONNX Runtime's own nodes need some room
LOADS_WEIGHTS = Version("1.23.0")  # the first ONNX Runtime with trt_load_user_initializer
CUDA_OPTIONS = {"use_tf32": "0"}  # makes float32 products of fake-quantized operands as exact as the CPU's


@dataclass(frozen=True)
class Provider:
    """One execution provider.

    name: the value of --provider. execution_provider: ONNX Runtime's name. effect: a sentence about quantized products,
    for people. device: the device on which outputs may stay, for ONNX Runtime's I/O binding.
    """

    name: str
    execution_provider: str
    effect: str
    device: str = "cpu"

    @property
    def tensorrt(self) -> bool:
        """Whether it is a TensorRT."""
        return self.execution_provider in (TENSORRT, RTX)


PROVIDERS: Mapping[str, Provider] = {
    provider.name: provider
    for provider in (
        Provider("cpu", CPU, "every quantized product is an integer kernel"),
        Provider("cuda", CUDA, "Q/DQ runs as float: the right logits, but no INT8 speed", "cuda"),
        Provider("tensorrt", TENSORRT, "TensorRT 10 compiles Q/DQ to INT8 kernels at the first run", "cuda"),
        Provider("nv-tensorrt-rtx", RTX, "TensorRT for RTX compiles Q/DQ to INT8 kernels"),
    )
}


def find_provider(name: str) -> Provider:
    """The provider of this name. Raises UserError if there is none."""
    if name not in PROVIDERS:
        raise UserError(f"--provider {name}", expected=f"one of {', '.join(PROVIDERS)}")
    return PROVIDERS[name]


def provider_options(
    name: str, inputs: Mapping[str, Sequence[int | str]], *, half: bool, large: bool, longest: int, cache: Path
) -> list:
    """The argument `providers` of an ONNX Runtime session, in order of preference. The RTX plugin has none.

    inputs: the dimensions of each input of the graph; a string is a dimension that varies. half: whether the body is
    float16. large: whether graph and weights exceed one protobuf message (`is_large`). longest: the most tokens of a
    sequence. cache: a folder for compiled engines.
    """
    cuda = (CUDA, dict(CUDA_OPTIONS))
    if name == "cpu":
        return [CPU]
    if name == "cuda":
        return [cuda, CPU]
    least, usual, most = profile_shapes(inputs, longest)
    options = {
        "trt_int8_enable": "True",  # Q/DQ has its scales, so no calibration table is needed
        "trt_fp16_enable": str(half),
        "trt_engine_cache_enable": "True",
        "trt_engine_cache_path": str(cache),
        "trt_timing_cache_enable": "True",
        "trt_timing_cache_path": str(cache),
        "trt_profile_min_shapes": least,
        "trt_profile_opt_shapes": usual,
        "trt_profile_max_shapes": most,
        **({"trt_load_user_initializer": "True"} if large else {}),
    }
    return [(TENSORRT, options), cuda, CPU]


def rtx_options(inputs: Mapping[str, Sequence[int | str]], *, longest: int, cache: Path) -> dict[str, str]:
    """The options of the RTX plugin. The arguments are those of `provider_options`."""
    least, usual, most = profile_shapes(inputs, longest)
    return {
        "nv_profile_min_shapes": least,
        "nv_profile_opt_shapes": usual,
        "nv_profile_max_shapes": most,
        "nv_runtime_cache_path": str(cache),
    }


def profile_shapes(inputs: Mapping[str, Sequence[int | str]], longest: int) -> tuple[str, str, str]:
    """The least, usual and most shapes of all inputs, in the spelling of both TensorRT providers:
    "input_ids:1x1,attention_mask:1x1,...".

    One profile serves prefill and decode of one sequence. Without explicit shapes the providers would compile again
    whenever the cache is longer than ever before. longest: the most tokens of a sequence.
    """
    length = min(longest, LONGEST_PROFILE)
    profile = single_profile(1, length, length)
    shapes = {name: profile.shapes(name, dims) for name, dims in inputs.items()}
    least, usual, most = (
        ",".join(f"{name}:{'x'.join(map(str, points[point]))}" for name, points in shapes.items()) for point in range(3)
    )
    return least, usual, most


def is_large(nbytes: int) -> bool:
    """Whether a graph of so many bytes, its weights included, exceeds one protobuf message."""
    return nbytes > LARGEST_MESSAGE


def check_size(folder: Path, nbytes: int) -> None:
    """Raise MissingPackageError if this ONNX Runtime cannot give TensorRT so large a graph. nbytes: with weights."""
    version = require("onnxruntime").__version__
    if is_large(nbytes) and Version(version) < LOADS_WEIGHTS:
        raise MissingPackageError(
            f"{folder}: {nbytes / 1e9:.1f} GB, and ONNX Runtime {version} gives TensorRT at most 2 GB",
            expected=f"onnxruntime-gpu >= {LOADS_WEIGHTS}",
            do="install a later onnxruntime-gpu, or use smoothquant build tensorrt",
        )


def engine_cache(source: str) -> Path:
    """A folder for engines that providers compile. source: a fingerprint of what from; providers see no weights."""
    path = cache.place("engines") / source
    make_folder(path)
    return path


def check_available(provider: Provider) -> None:
    """Raise MissingPackageError if this ONNX Runtime lacks the provider or cannot load it. The error says what to
    install."""
    onnxruntime = require("onnxruntime")
    if provider.name == "nv-tensorrt-rtx":
        _check_rtx(onnxruntime)
        return
    if provider.execution_provider not in onnxruntime.get_available_providers():
        raise MissingPackageError(
            f"this ONNX Runtime ({onnxruntime.__version__}) has no {provider.execution_provider}",
            expected="the package onnxruntime-gpu",
            do="pip uninstall onnxruntime && pip install onnxruntime-gpu[cuda,cudnn]",
        )
    if provider.name == "cpu":
        return
    preload: Callable[[], None] | None = getattr(onnxruntime, "preload_dlls", None)
    if preload is not None:
        preload()  # CUDA's libraries, from pip packages
    if provider.name == "tensorrt":
        with suppress(ImportError, OSError):
            import_module("tensorrt")  # loads its libraries, so that they are found
        _check_library(
            "libnvinfer.so.10",
            "TensorRT 10: pip install 'tensorrt-cu13<11', where no TensorRT 11 is, or NVIDIA's container",
        )
    _check_library("libcuda.so.1", "a machine with an NVIDIA GPU and its driver (docker run --gpus all)")


def check_loaded(provider: Provider, session: Any) -> None:
    """Raise MissingPackageError if ONNX Runtime made the session without the provider, which it does in silence."""
    if provider.execution_provider not in session.get_providers():
        raise MissingPackageError(
            f"ONNX Runtime could not load {provider.execution_provider}, and fell back to "
            f"{', '.join(session.get_providers())}",
            expected="CUDA 13 and cuDNN 9 libraries that match onnxruntime-gpu",
            do="pip install onnxruntime-gpu[cuda,cudnn], or use --provider cpu",
        )


def rtx_devices() -> list:
    """The devices of the registered RTX plugin. Raises MissingPackageError if there are none."""
    onnxruntime = require("onnxruntime")
    devices = [device for device in onnxruntime.get_ep_devices() if device.ep_name == RTX]
    if not devices:
        raise MissingPackageError(
            "TensorRT for RTX finds no GPU that it runs on",
            expected="an RTX GPU of compute capability 8.6, 8.9 or from 12.0 on (not A100, 8.0, or H100, 9.0)",
            do="use --provider tensorrt, or smoothquant build tensorrt",
        )
    return devices


def _check_rtx(onnxruntime: Any) -> None:
    """Register the RTX plugin. ONNX Runtime's error about a second registration is ignored."""
    plugin = require(RTX_MODULE, "the RTX provider is not installed", RTX_PACKAGE)
    if any(device.ep_name == RTX for device in onnxruntime.get_ep_devices()):
        return
    try:
        onnxruntime.register_execution_provider_library(RTX, plugin.get_library_path())
    except Exception as error:  # onnxruntime raises bare exceptions of many classes
        if "already registered" in str(error):
            return
        reason = str(error).rpartition("with error: ")[2]
        raise MissingPackageError(
            f"the RTX provider cannot be loaded ({reason})",
            expected="a machine with an RTX GPU and its driver",
            do="use --provider cpu here",
        ) from error


def _check_library(name: str, wanted: str) -> None:
    try:
        ctypes.CDLL(name)
    except OSError as error:
        raise MissingPackageError(f"{error}", expected=wanted) from error
