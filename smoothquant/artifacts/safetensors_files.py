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

CODES = {  # every dtype that the format has and the package reads
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.complex64: "C64",
}


@dataclass(frozen=True)
class Planned:
    """A tensor to come."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    @property
    def row_nbytes(self) -> int:
        return torch.Size(self.shape[1:]).numel() * self.dtype.itemsize


class SafetensorsFile:
    """One file. plan: every tensor's name, shape and dtype, in the order on disk. What an interrupted run wrote is
    kept."""

    def __init__(self, path: Path, plan: Mapping[str, Planned]) -> None:
        self.path, self.plan = path, plan
        header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, planned in plan.items():
            begin, end = end, end + planned.nbytes
            header[name] = {
                "dtype": CODES[planned.dtype],
                "shape": list(planned.shape),
                "data_offsets": [begin, end],
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self._offsets = {name: 8 + len(text) + header[name]["data_offsets"][0] for name in plan}
        path.touch()
        with open(path, "r+b") as out:
            out.write(len(text).to_bytes(8, "little") + text)
            out.truncate(8 + len(text) + end)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a whole tensor. Shape and dtype must be as planned."""
        self.write_rows(name, [tensor])

    def write_rows(self, name: str, parts: Iterable[Tensor]) -> None:
        """Write a tensor that comes some rows at a time."""
        written = 0
        for part in parts:
            written += self.write_part(name, part, written)
        if written != self.plan[name].shape[0]:
            raise ValueError(f"{name}: {written} rows written, planned {self.plan[name]}")

    def write_part(self, name: str, part: Tensor, row: int) -> int:
        """Write some rows of a tensor, from `row` on. Returns how many."""
        planned = self.plan[name]
        if part.dtype != planned.dtype or part.shape[1:] != planned.shape[1:] or row + len(part) > planned.shape[0]:
            raise ValueError(f"{name}: got {part.dtype} {tuple(part.shape)} at row {row}, planned {planned}")
        with open(self.path, "r+b") as file:
            file.seek(self._offsets[name] + row * planned.row_nbytes)
            file.write(part.contiguous().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        return len(part)
