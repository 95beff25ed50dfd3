"""Read a TensorRT-LLM checkpoint folder: config.json and rank0.safetensors, rank1.safetensors, ..."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from builders.tensorrt_llm.format.config import CheckpointConfig, parse
from builders.tensorrt_llm.format.findings import CONFIG, errors
from builders.tensorrt_llm.format.rules import config_findings
from smoothquant.errors import CheckpointError, raise_refusal
from smoothquant.outputs import is_output, load_manifest
from smoothquant.reading import read_json, read_object

DTYPES: Mapping[str, torch.dtype] = {
    "I8": torch.int8,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
}


@dataclass(frozen=True)
class Header:
    """The header of a tensor in a rank file. dtype: the dtype of torch, or safetensors' name if torch has none."""

    shape: tuple[int, ...]
    dtype: torch.dtype | str


def rank_file(folder: Path, rank: int) -> Path:
    return folder / f"rank{rank}.safetensors"


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder looks like a TensorRT-LLM checkpoint, even a broken one."""
    return any(folder.glob("rank*.safetensors")) or {"architecture", "mapping"} <= read_json(folder / CONFIG).keys()


def read_config(folder: Path) -> dict[str, Any]:
    """The object in config.json. Raises CheckpointError if it is missing or not a JSON object."""
    return read_object(
        folder / CONFIG,
        CheckpointError,
        wanted="a TensorRT-LLM checkpoint folder",
        do="check the path, or make the checkpoint again",
    )


def load_config(folder: Path) -> CheckpointConfig:
    """The configuration of a checkpoint, with the window of our manifest if it has one.

    Raises CheckpointError with the first error that `config_findings` finds.
    """
    content = read_config(folder)
    found = errors(config_findings(content))
    if found:
        raise CheckpointError(
            f"{folder}: {found[0].where} {found[0].what}",
            expected=found[0].expected,
            do="see all faults with smoothquant check",
        )
    geometry = load_manifest(folder).geometry if is_output(folder) else None
    return replace(parse(content), window=geometry.cache_window if geometry else None)


class RankFile:
    """The tensors of one rank in a mapped file, read on demand. Raises CheckpointError for a broken file."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.path = rank_file(folder, rank)
        try:
            self._file = safe_open(str(self.path), framework="pt")
        except (OSError, SafetensorError) as error:
            raise_refusal(error, self.path)
            raise CheckpointError(
                f"{self.path}: " + ("no such file" if not self.path.exists() else f"truncated or corrupt ({error})"),
                expected="one whole safetensors file for each rank",
                do="make the checkpoint again",
            ) from error

    @property
    def headers(self) -> dict[str, Header]:
        """The shape and dtype of each tensor, by name."""
        found = {}
        for name in self._file.keys():  # noqa: SIM118 (no mapping)
            part = self._file.get_slice(name)
            found[name] = Header(tuple(part.get_shape()), DTYPES.get(part.get_dtype(), part.get_dtype()))
        return found

    def __getitem__(self, name: str) -> Tensor:
        return self._file.get_tensor(name)
