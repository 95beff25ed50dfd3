"""What a machine can build and run: processor, memory, GPU, packages."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from builders.check.tensorrt_rtx.packages import VERSIONS
from builders.engine.faster import faster_engine
from smoothquant.machine import cpu_flags, cpuinfo, int8_flag, physical_cores
from smoothquant.packages import CONVERT, INSTALL

INT8_KERNELS = {  # the best of a processor's `smoothquant.machine.INT8_FLAGS`: what it means for integer products
    "amx_int8": "AMX INT8 tiles and AVX512-VNNI: INT8 at full speed",
    "avx512_vnni": "AVX512-VNNI: INT8 at full speed, about 4x the FP32 rate",
    "avx_vnni": "AVX-VNNI: INT8 at full speed",
    "avx2": "AVX2 without VNNI: INT8 runs, slower, and its 16-bit sums saturate in OpenVINO",
    "asimddp": "Arm dot product: INT8 at full speed",
    "": "no integer dot product known",
}


@dataclass(frozen=True)
class Fact:
    name: str
    found: str


@dataclass(frozen=True)
class Ability:
    """command: what a user would type; needs: packages; ready: whether they are here; how: versions or what to do."""

    command: str
    needs: tuple[str, ...]
    ready: bool
    how: str


@dataclass(frozen=True)
class Report:
    facts: tuple[Fact, ...]
    abilities: tuple[Ability, ...]
    advice: tuple[str, ...]

    def as_dict(self) -> dict:
        return asdict(self)


ORT_GPU = "pip uninstall onnxruntime; pip install onnx onnxruntime-gpu[cuda,cudnn]"
TENSORRT = "tensorrt|tensorrt-cu13|tensorrt-cu12"
RTX = "onnxruntime-ep-nv-tensorrt-rtx-cu13|onnxruntime-ep-nv-tensorrt-rtx-cu12"


class Command(NamedTuple):
    """A command, and the packages that must be here for it, alternatives with |, those of one version only with ==.
    instead: what to do where they are not, if not to install them; gpu: whether it needs one, too."""

    command: str
    needs: tuple[str, ...]
    instead: str = ""
    gpu: bool = False


COMMANDS = (
    Command("calibrate, export hf, export w8a8, export modelopt, validate", CONVERT, INSTALL),
    Command("calibrate --text hf:DATASET", ("datasets",)),
    Command("calibrate --text FILE.jsonl.zst", ("zstandard",)),
    Command("export onnx", ("onnx",)),
    Command("generate (an ONNX Runtime engine)", ("onnxruntime|onnxruntime-gpu",)),
    Command("serve", ("onnxruntime|onnxruntime-gpu|openvino", "fastapi", "uvicorn", "prometheus-client")),
    Command("build onnxruntime, demo", ("onnx", "onnxruntime|onnxruntime-gpu")),
    Command("build openvino", ("onnx", "openvino")),
    Command("build onnxruntime --provider cuda", ("onnx", "onnxruntime-gpu"), ORT_GPU, gpu=True),
    Command(
        "build onnxruntime --provider tensorrt",
        ("onnx", "onnxruntime-gpu", TENSORRT),
        f"in a virtual environment without TensorRT 11: {ORT_GPU} 'tensorrt-cu13<11'",
        gpu=True,
    ),
    Command("build onnxruntime --provider nv-tensorrt-rtx", ("onnx", "onnxruntime", RTX), gpu=True),
    Command(
        "build tensorrt", ("onnx", TENSORRT), "pip install onnx tensorrt, or the image of docker/tensorrt", gpu=True
    ),
    Command("generate --triton", ("tritonclient", "grpcio", "protobuf")),
    Command("validate (a W8A8 checkpoint)", ("compressed-tensors",)),
    Command("check (an ONNX graph)", ("onnx",)),
    Command("check --compiler tensorrt-rtx", tuple(VERSIONS.split())),
    Command("check, validate (TensorRT-LLM), serve-config", ("torch", "safetensors"), INSTALL),
    Command("build tensorrt-llm", ("tensorrt_llm",), "in docker/tensorrt-llm; --dry-run works here"),
)


def examine() -> Report:
    """Look at this machine; nothing is imported but this package's own modules."""
    flags = cpu_flags()
    gpus = _gpus()
    disk = shutil.disk_usage(Path.cwd())
    facts = (
        Fact("system", f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"),
        Fact("processor", f"{_cpu_name()}, {physical_cores()} cores"),
        Fact("INT8 on this processor", INT8_KERNELS[int8_flag(flags)]),
        Fact("memory", f"{_memory_gb():.0f} GB"),
        Fact("disk here", f"{disk.free / 1e9:.0f} GB free"),
        Fact("GPU", "; ".join(gpus) or "none found (nvidia-smi)"),
    )
    abilities = tuple(_ability(target, gpus) for target in COMMANDS)
    advice = [faster_engine(flags)]
    if gpus and not _version("onnxruntime-gpu"):
        advice.append(
            "there is a GPU: INT8 on it comes from smoothquant build tensorrt, or from ONNX Runtime's TensorRT "
            "providers; its CUDA provider (onnxruntime-gpu) runs Q/DQ as float"
        )
    trtllm = _version("tensorrt_llm")
    if trtllm:
        from exporters.trtllm.versions import LAST, STABLE, builds_engines

        if not builds_engines(trtllm):
            advice.append(f"TensorRT-LLM {trtllm} builds no engines ({LAST} was the last that does): use {STABLE}")
    return Report(facts, abilities, tuple(advice))


def _ability(target: Command, gpus: list[str]) -> Ability:
    command, needs, instead, gpu = target
    found = {need: next(filter(None, map(_version, need.split("|"))), None) for need in needs}
    missing = [need.split("|")[0] for need, version in found.items() if version is None]
    if missing:
        how = instead or f"pip install {' '.join(missing)}"
    else:
        how = ", ".join(f"{need.split('|')[0].split('==')[0]} {version}" for need, version in found.items())
    lacks_gpu = gpu and not gpus
    return Ability(command, needs, not missing and not lacks_gpu, f"{how}; an NVIDIA GPU" if lacks_gpu else how)


def _version(package: str) -> str | None:
    """package: its name, or NAME==VERSION."""
    name, _, wanted = package.partition("==")
    try:
        found = metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
    return found if wanted in ("", found) else None


def _cpu_name() -> str:
    return next((line.split(":")[1].strip() for line in cpuinfo() if line.startswith("model name")), platform.machine())


def _memory_gb() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9


def _gpus() -> list[str]:
    if not shutil.which("nvidia-smi"):
        return []
    query = ["nvidia-smi", "--query-gpu=name,memory.total,compute_cap", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return found.stdout.strip().splitlines()
