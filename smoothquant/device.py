"""Choose the device and the dtype of a computation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from smoothquant.errors import MissingPackageError, UserError
from smoothquant.machine import cpu_flags

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
BFLOAT16_FLAGS = {"amx_bf16", "avx512_bf16", "bf16"}  # x86 tiles, x86 vectors, Arm


def choose_device(name: str = "auto") -> str:
    """The device to compute on: "auto" takes the first CUDA device, or else the CPU.

    Raises MissingPackageError if this machine lacks the device, UserError for an unknown name.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name.partition(":")[0] not in ("cpu", "cuda"):
        raise UserError(f"device {name!r}", expected="auto, cpu, cuda or cuda:N")
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise MissingPackageError(
            f"device {name!r} is not there ({str(error).splitlines()[0]})",
            do="use --device cpu, or install a PyTorch with CUDA",
        ) from error
    return name


def free_bytes(device: str) -> int:
    """The bytes of memory that are free on a GPU."""
    return torch.cuda.mem_get_info(device)[0]


def choose_dtype(name: str, stored: torch.dtype, device: str) -> torch.dtype:
    """The dtype to compute in. stored: the dtype of the checkpoint.

    "auto" keeps the checkpoint's dtype on a GPU, and keeps float32 on any device. On a CPU with bfloat16 instructions
    it takes bfloat16 for a 16-bit checkpoint, even for a float16 one, whose activations then cannot overflow.
    """
    if name != "auto":
        if name not in DTYPES:
            raise UserError(f"dtype {name!r}", expected=f"auto or one of {', '.join(DTYPES)}")
        return DTYPES[name]
    if stored == torch.float32 or device.startswith("cuda"):
        return stored
    return torch.bfloat16 if BFLOAT16_FLAGS & cpu_flags() else torch.float32


def declared_dtype(config: Mapping[str, Any], stored: torch.dtype) -> torch.dtype:
    """The dtype that those who load a Hugging Face folder compute in: what its config.json says, or else `stored`, that
    of its weights."""
    name = config.get("dtype") or config.get("torch_dtype")
    return DTYPES.get(str(name).removeprefix("torch."), stored)
