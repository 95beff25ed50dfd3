"""ONNX external data, written in place: the layout is known before the first weight is read.

    model.onnx.data = tensors in the order they were planned, each at an aligned offset

Large tensors start at a page boundary, so that an engine can map them. Every tensor lands at its own offset whenever
it is written: an interrupted export goes on, and its file is the one an uninterrupted export writes.
Format: https://onnx.ai/onnx/repo-docs/ExternalData.html
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from smoothquant.artifacts.safetensors_files import as_bytes
from smoothquant.data_file import DataFile
from smoothquant.files import Piece

FILE = "model.onnx.data"
PAGE, SMALL = 4096, 64  # alignment of large tensors and of those below 16 pages
TOGETHER = 64 << 20  # bytes of a matrix that is transposed as a whole; of a larger one, a part after the other is


@dataclass(frozen=True)
class Content:
    """What a tensor holds.

    parts: gives it some rows at a time; called with a layer, smoothed and quantized (None in a float graph), or with
    nothing outside the layers. layer: the layer's index. transposed: the parts are rows of the tensor's transpose.
    """

    parts: Callable[..., Iterable[Tensor]]
    layer: int | None = None
    transposed: bool = False


@dataclass(frozen=True)
class Place:
    """A planned tensor: shape, dtype, content, and where it lies, offset and length in bytes. begin: where the zeros
    before it begin, which align it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    content: Content
    begin: int
    offset: int

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class ExternalData:
    """The layout of one data file, and the writing into it."""

    def __init__(self) -> None:
        self.places: dict[str, Place] = {}
        self.nbytes = 0

    def plan(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, content: Content) -> None:
        """Reserve the next place. Names are unique."""
        if name in self.places:
            raise ValueError(f"{name} is planned twice")
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        alignment = PAGE if nbytes >= 16 * PAGE else SMALL
        place = Place(shape, dtype, content, self.nbytes, -(-self.nbytes // alignment) * alignment)
        self.places[name] = place
        self.nbytes = place.offset + nbytes

    def open(self, file: DataFile) -> None:
        """Give the file its full length; what an interrupted run wrote stays."""
        self.file = file
        file.reserve(self.nbytes)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a whole tensor. Shape and dtype must be as planned."""
        place = self.places[name]
        if tensor.shape != place.shape:
            raise ValueError(f"{name}: shape {tuple(tensor.shape)}, planned {place.shape}")
        self.write_rows(name, [tensor])

    def write_rows(self, name: str, parts: Iterable[Tensor]) -> None:
        """Write a tensor that comes some rows at a time."""
        self._write(name, self._rows(name, parts))

    def write_transposed(self, name: str, parts: Iterable[Tensor]) -> None:
        """Write a matrix (in, out) whose transpose, (out, in), comes some rows at a time."""
        self._write(name, self._columns(name, parts))

    def _rows(self, name: str, parts: Iterable[Tensor]) -> Iterator[Piece]:
        place = self.places[name]
        offset = place.offset
        for part in parts:
            content = _bytes(name, part, place, axis=0)
            yield offset, content
            offset += len(content)

    def _columns(self, name: str, parts: Iterable[Tensor]) -> Iterator[Piece]:
        place = self.places[name]
        width, itemsize = place.shape[1], place.dtype.itemsize
        start = 0
        if place.nbytes <= TOGETHER:
            parts = [torch.cat(list(parts))]
        for part in parts:
            content, length = _bytes(name, part.t(), place, axis=1), len(part) * itemsize  # (in, rows of the part)
            if len(part) == width:
                yield place.offset, content
                return
            for row in range(place.shape[0]):
                offset = place.offset + (row * width + start) * itemsize
                yield offset, content[row * length : (row + 1) * length]
            start += len(part)

    def _write(self, name: str, pieces: Iterable[Piece]) -> None:
        """Write a tensor; the zeros that align it count as written."""
        place, written = self.places[name], 0

        def counted() -> Iterator[Piece]:
            nonlocal written
            for offset, content in pieces:
                written += len(content)
                yield offset, content

        self.file.write(counted(), place.begin, place.offset + place.nbytes)
        if written != place.nbytes:
            raise ValueError(f"{name}: {written} bytes written, {place.nbytes} planned")


def _bytes(name: str, tensor: Tensor, place: Place, axis: int) -> memoryview:
    """Content of a tensor, which may be a part of the planned one along `axis`."""
    planned = place.shape[:axis] + tuple(tensor.shape[axis : axis + 1]) + place.shape[axis + 1 :]
    if tensor.dtype != place.dtype or tensor.shape != planned:
        raise ValueError(f"{name}: {tensor.dtype} {tuple(tensor.shape)}, planned {place.dtype} {place.shape}")
    return as_bytes(tensor)
