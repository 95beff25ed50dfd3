"""Write safetensors files in place: names, shapes and dtypes first, then tensors in any order, none kept in memory.

    file = u64 header size | JSON header, padded with spaces to 8 bytes | tensors, in the order of the header
    header = {name: {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {"format": "pt"}}

The package safetensors writes a file from tensors that are all in memory. Here the layout is fixed before the first
tensor exists, so that every tensor lands at its own offset and an interrupted export can continue.
Format: https://huggingface.co/docs/safetensors (file layout).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from smoothquant import files
from smoothquant.data_file import DataFile

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
    """The shape and dtype of a tensor that will be written."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    @property
    def row_nbytes(self) -> int:
        return torch.Size(self.shape[1:]).numel() * self.dtype.itemsize


class SafetensorsFile:
    """One file. plan: the shape and dtype of every tensor by name, in the order on disk. The tensors of an interrupted
    run are kept."""

    def __init__(self, file: DataFile, plan: Mapping[str, Planned]) -> None:
        self.file, self.plan = file, plan
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
        if file.is_new:
            file.reserve(8 + len(text) + end)
            self._write(0, memoryview(len(text).to_bytes(8, "little") + text))

    @property
    def name(self) -> str:
        """The name of the file in its folder."""
        return self.file.path.name

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a whole tensor. Shape and dtype must be as planned."""
        if tensor.shape != self.plan[name].shape:
            raise ValueError(f"{name}: shape {tuple(tensor.shape)}, planned {self.plan[name].shape}")
        self.write_rows(name, [tensor.reshape(-1, *tensor.shape[1:])])

    def write_rows(self, name: str, parts: Iterable[Tensor]) -> None:
        """Write a tensor that comes some rows at a time."""
        written = 0
        for part in parts:
            written += self.write_part(name, part, written)
        if written != (self.plan[name].shape or (1,))[0]:
            raise ValueError(f"{name}: {written} rows written, planned {self.plan[name]}")

    def write_part(self, name: str, part: Tensor, row: int) -> int:
        """Write some rows of a tensor, from `row` on. Returns their number."""
        planned = self.plan[name]
        rows = (planned.shape or (1,))[0]
        if part.dtype != planned.dtype or part.shape[1:] != planned.shape[1:] or row + len(part) > rows:
            raise ValueError(f"{name}: got {part.dtype} {tuple(part.shape)} at row {row}, planned {planned}")
        self._write(self._offsets[name] + row * planned.row_nbytes, as_bytes(part))
        return len(part)

    def _write(self, offset: int, content: memoryview) -> None:
        self.file.write([(offset, content)], offset, offset + len(content))


def read_header(file: Path) -> tuple[int, dict[str, dict]]:
    """Where the tensors of a safetensors file begin, in bytes, and what its header says of each."""
    with open(file, "rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(length))
    header.pop("__metadata__", None)
    return 8 + length, header


def as_bytes(tensor: Tensor) -> memoryview:
    """The content of a tensor, row by row."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors to a file so that it is there whole or not at all."""
    with files.aside(path) as new:
        plan = {name: Planned(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
        file = SafetensorsFile(DataFile(new), plan)
        for name, tensor in tensors.items():
            file.write(name, tensor)
