"""Find out whether this machine can build an engine: the tool, its version, a GPU that runs INT8 kernels."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from builders.tensorrt_llm.build.command import TOOL
from builders.tensorrt_llm.format.releases import has_kernels
from exporters.trtllm.versions import FIRST, LAST, STABLE, builds_engines
from smoothquant.errors import MissingPackageError

ASK = "from importlib.metadata import version; print(version('tensorrt_llm'))"
SUPPORTED = f"TensorRT-LLM {FIRST} to {STABLE}"


@dataclass(frozen=True)
class Environment:
    """The means to build an engine here. tool: the path of `trtllm-build`. version: the version of TensorRT-LLM.
    gpus: (name, compute capability) of each GPU; empty if unknown."""

    tool: Path
    version: str
    gpus: tuple[tuple[str, str], ...]


def find_environment(instead: str) -> Environment:
    """The means to build an engine here. instead: a command that builds it elsewhere, for the errors.

    Raises MissingPackageError without the tool, with a version that builds no SmoothQuant engines, or without a GPU
    that runs them.
    """
    found = shutil.which(TOOL)
    if found is None:
        raise MissingPackageError(f"{TOOL} is not on PATH", expected=SUPPORTED, do=f"run instead: {instead}")
    tool = Path(found)
    version = _version(tool)
    if version is None:
        raise MissingPackageError(
            f"{tool}: cannot tell its version of TensorRT-LLM", expected=SUPPORTED, do=f"run instead: {instead}"
        )
    if not builds_engines(version):
        raise MissingPackageError(
            f"TensorRT-LLM {version} builds no SmoothQuant engines",
            expected=f"{SUPPORTED} (the engine path ended with {LAST})",
            do=f"run instead: {instead}",
        )
    gpus = _gpus()
    if gpus == ():
        raise MissingPackageError(
            "no GPU is visible here (nvidia-smi lists none)",
            expected="a GPU to build on",
            do="start the container with --gpus all",
        )
    for name, capability in gpus or ():
        if not has_kernels(capability):
            raise MissingPackageError(
                f"{name} has compute capability {capability}, for which TensorRT-LLM has no SmoothQuant kernels",
                expected="compute capability 8.0 to 9.0 (Ampere, Ada, Hopper), or 12.0 on",
                do="build on the kind of GPU that will serve",
            )
    return Environment(tool, version, gpus or ())


def _version(tool: Path) -> str | None:
    """The version of TensorRT-LLM in the Python that the tool's first line names, or else in this Python; None if
    neither can tell."""
    try:
        with open(tool, "rb") as file:
            first = file.readline(1000).decode(errors="replace")
        if first.startswith("#!"):
            command = [*first[2:].split(), "-c", ASK]
            found = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
            return found.stdout.split()[-1]
    except (OSError, subprocess.SubprocessError, IndexError):
        pass
    try:
        return metadata.version("tensorrt_llm")
    except metadata.PackageNotFoundError:
        return None


def _gpus() -> tuple[tuple[str, str], ...] | None:
    """(name, compute capability) of every GPU; None if nvidia-smi is missing or fails."""
    if not shutil.which("nvidia-smi"):
        return None
    query = ["nvidia-smi", "--query-gpu=name,compute_cap", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.SubprocessError):
        return None
    pairs = (line.rpartition(",") for line in found.stdout.splitlines() if "," in line)
    return tuple((name.strip(), capability.strip()) for name, _, capability in pairs if _is_number(capability))


def _is_number(text: str) -> bool:
    return text.strip().replace(".", "", 1).isdigit()
