"""ONNX external data, written in place: the layout is known before the first weight is read.

    model.onnx.data = tensors in the order they were planned, each at an aligned offset

Large tensors start at a page boundary, so that an engine can map them. Every tensor lands at its own offset whenever
it is written: an interrupted export goes on, and its file is the one an uninterrupted export writes.
Format: https://onnx.ai/onnx/repo-docs/ExternalData.html
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from smoothquant.artifacts.safetensors_files import as_bytes
from smoothquant.data_file import DataFile
from smoothquant.files import Piece
from smoothquant.stream import WeightRows

FILE = "model.onnx.data"
PAGE, SMALL = 4096, 64  # alignment of large tensors and of those below 16 pages
TOGETHER = 64 << 20  # bytes of columns that are written together, so that not every row is many small pieces


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
class WeightContent:
    """What the weight of a layer's linears, side by side, holds: the rows of its transpose are handed over.

    rows: gives it from some rows of a linear. starts: role -> the linear's first column.
    """

    layer: int
    rows: Callable[[WeightRows], Tensor]
    starts: Mapping[str, int]


@dataclass(frozen=True)
class Place:
    """A planned tensor: shape, dtype, content, and where it lies, offset and length in bytes. begin: where the zeros
    before it begin, which align it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    content: Content | WeightContent
    begin: int
    offset: int

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    @property
    def column_nbytes(self) -> int:
        """Bytes of a column of a matrix."""
        return self.shape[0] * self.dtype.itemsize


class ExternalData:
    """The layout of one data file, and the writing into it."""

    def __init__(self) -> None:
        self.places: dict[str, Place] = {}
        self.nbytes = 0
        self._held: _Columns | None = None
        self._columns: dict[str, int] = {}  # how many columns are written of a matrix that is not whole yet

    def plan(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, content: Content | WeightContent) -> None:
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
        column = 0
        for part in parts:
            self.write_columns(name, column, part)
            column += len(part)
        self._check(name, column * self.places[name].column_nbytes)

    def write_columns(self, name: str, column: int, part: Tensor) -> None:
        """Write some columns of a matrix (in, out), from `column` on. part: rows of its transpose, (columns, in). They
        may be held until the next come; the matrix counts as written when its last columns have come."""
        place, held = self.places[name], self._held
        planned = (place.shape[1] - column, place.shape[0])
        if part.dtype != place.dtype or part.shape[1:] != planned[1:] or len(part) > planned[0]:
            raise ValueError(f"{name}: {part.dtype} {tuple(part.shape)}, planned {place.dtype} {place.shape}")
        if held and not held.takes(name, column, len(part)):
            self._write_held(held)
            held = None
        if held is None:
            room = min(planned[0], max(len(part), TOGETHER // place.column_nbytes))
            held = self._held = _Columns(name, column, part.new_empty(place.shape[0], room))
        held.add(part)
        if held.filled == held.room:
            self._write_held(held)

    def _write_held(self, held: _Columns) -> None:
        place, self._held = self.places[held.name], None
        self._columns[held.name] = self._columns.get(held.name, 0) + held.filled
        if self._columns[held.name] == place.shape[1]:
            del self._columns[held.name]
            self.file.write(held.pieces(place), place.begin, place.offset + place.nbytes)
        else:
            self.file.write(held.pieces(place), place.begin, place.begin)  # nothing is whole yet

    def _rows(self, name: str, parts: Iterable[Tensor]) -> Iterator[Piece]:
        place = self.places[name]
        offset = place.offset
        for part in parts:
            content = _bytes(name, part, place)
            yield offset, content
            offset += len(content)

    def _write(self, name: str, pieces: Iterable[Piece]) -> None:
        """Write a tensor; the zeros that align it count as written."""
        place, written = self.places[name], 0

        def counted() -> Iterator[Piece]:
            nonlocal written
            for offset, content in pieces:
                written += len(content)
                yield offset, content

        self.file.write(counted(), place.begin, place.offset + place.nbytes)
        self._check(name, written)

    def _check(self, name: str, written: int) -> None:
        """Raise ValueError unless a whole tensor was written. written: its bytes."""
        if written != self.places[name].nbytes:
            raise ValueError(f"{name}: {written} bytes written, {self.places[name].nbytes} planned")


@dataclass
class _Columns:
    """Columns of a matrix that are written together. columns: (in, room), of which `filled` are there."""

    name: str
    first: int
    columns: Tensor
    filled: int = 0

    @property
    def room(self) -> int:
        return self.columns.shape[1]

    def takes(self, name: str, column: int, count: int) -> bool:
        """Whether some columns of a matrix are the next ones, and have room here."""
        return name == self.name and column == self.first + self.filled and self.filled + count <= self.room

    def add(self, part: Tensor) -> None:
        """Take the next ones. part: (columns, in)."""
        self.columns[:, self.filled : self.filled + len(part)] = part.t()
        self.filled += len(part)

    def pieces(self, place: Place) -> Iterator[Piece]:
        """Where they are written: row by row, or all at once if they are the whole matrix."""
        content, itemsize = as_bytes(self.columns), place.dtype.itemsize
        if self.filled == place.shape[1]:
            yield place.offset, content
            return
        for row in range(place.shape[0]):
            start = row * self.room * itemsize
            offset = place.offset + (row * place.shape[1] + self.first) * itemsize
            yield offset, content[start : start + self.filled * itemsize]


def _bytes(name: str, tensor: Tensor, place: Place) -> memoryview:
    """Content of a tensor, or of some rows of it."""
    if tensor.dtype != place.dtype or tensor.shape[1:] != place.shape[1:]:
        raise ValueError(f"{name}: {tensor.dtype} {tuple(tensor.shape)}, planned {place.dtype} {place.shape}")
    return as_bytes(tensor)
