"""safetensors files written in place: names, shapes and dtypes first, tensors in any order, none kept in memory.

    file = u64 header size | JSON header, padded with spaces to 8 bytes | tensors, in the order of the header
    header = {name: {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {"format": "pt"}}

The safetensors package writes a file from tensors that are all in memory. Here the layout is fixed before the
first tensor is there, so that every tensor lands at its own offset and an interrupted export can go on.
Format: https://huggingface.co/docs/safetensors (file layout).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from smoothquant.workspace import write_json

CODES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.int8: "I8"}
MAX_SHARD = 5_000_000_000  # bytes, as transformers splits


@dataclass(frozen=True)
class Planned:
    """A tensor to come."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True)
class _Place:
    file: Path
    offset: int


class SafetensorsFiles:
    """`model.safetensors`, or shards of at most `max_shard` bytes with their index, in `folder`.

    plan: every tensor's name, shape and dtype, in the order on disk. Files that an interrupted run left are kept.
    """

    def __init__(self, folder: Path, plan: Mapping[str, Planned], max_shard: int = MAX_SHARD) -> None:
        self.plan = plan
        self._places: dict[str, _Place] = {}
        shards = list(_split(plan, max_shard))
        names = [f"model-{n + 1:05}-of-{len(shards):05}.safetensors" for n in range(len(shards))]
        if len(shards) == 1:
            names = ["model.safetensors"]
        for name, tensors in zip(names, shards, strict=True):
            self._prepare(folder / name, tensors)
        if len(shards) > 1:
            weight_map = {tensor: place.file.name for tensor, place in self._places.items()}
            size = sum(planned.nbytes for planned in plan.values())
            write_json(
                folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": weight_map}
            )

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a whole tensor. Shape and dtype must be as planned."""
        self.write_rows(name, [tensor])

    def write_rows(self, name: str, parts: Iterable[Tensor]) -> None:
        """Write a tensor that comes some rows at a time."""
        planned, place = self.plan[name], self._places[name]
        written = 0
        with open(place.file, "r+b") as file:
            file.seek(place.offset)
            for part in parts:
                if part.dtype != planned.dtype or part.shape[1:] != planned.shape[1:]:
                    raise ValueError(f"{name}: got {part.dtype} {tuple(part.shape)}, planned {planned}")
                written += file.write(part.contiguous().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        if written != planned.nbytes:
            raise ValueError(f"{name}: {written} bytes written, {planned.nbytes} planned")

    def _prepare(self, file: Path, tensors: list[str]) -> None:
        header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in tensors:
            planned = self.plan[name]
            begin, end = end, end + planned.nbytes
            header[name] = {
                "dtype": CODES[planned.dtype],
                "shape": list(planned.shape),
                "data_offsets": [begin, end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        for name in tensors:
            self._places[name] = _Place(file, 8 + len(text) + header[name]["data_offsets"][0])
        file.touch()
        with open(file, "r+b") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            out.truncate(8 + len(text) + end)


def _split(plan: Mapping[str, Planned], max_shard: int) -> Iterable[list[str]]:
    shard: list[str] = []
    size = 0
    for name, planned in plan.items():
        if shard and size + planned.nbytes > max_shard:
            yield shard
            shard, size = [], 0
        shard.append(name)
        size += planned.nbytes
    yield shard
