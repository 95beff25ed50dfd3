"""What a command may hold in memory: `--memory 2GB`.

    least   =  what every command holds  +  what this model asks for in any case  +  the smallest useful slices
    budget  >= least: what is left makes slices longer, batches and hidden states in memory larger

A slice is some rows of one matrix. Without a budget a layer is in memory, and a slice is a whole matrix. What an export
writes does not depend on it. Peaks are resident memory; files that the system keeps in its cache count for nothing.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from smoothquant.errors import UserError
from smoothquant.machine import free_memory
from smoothquant.model import ROWS, Model

FORM = re.compile(r"(\d+(?:\.\d+)?) ?([KMGT])(i?)B?", re.IGNORECASE)
PROCESS = 410 << 20  # bytes of the interpreter, torch and what else is loaded: 265 to 405 MB were measured on Linux
WRITER = 64 << 20  # bytes that the writer of a format may hold: of ONNX's, columns that are written together
LEAST_ROWS = 64  # of the widest matrix, in the smallest useful slice
WIDENED = 14  # bytes for every number of a slice beside those on disk: two of float32, two of int8, and temporaries


@dataclass(frozen=True)
class Budget:
    """What may be in memory at a time; None for as much as there is.

    numbers: of a weight. tokens: that go through a layer together. states: bytes of hidden states, which lie in mapped
    files beyond that, and of embeddings that are made.
    """

    numbers: int | None = None
    tokens: int | None = None
    states: int | None = None


UNLIMITED = Budget()


def parse(text: str) -> int:
    """The bytes that "2GB", "1.5GiB" or "500M" stand for. Raises UserError for anything else."""
    found = FORM.fullmatch(text.strip())
    nbytes = 0
    if found:
        power = "KMGT".index(found[2].upper()) + 1
        nbytes = int(float(found[1]) * (1024 if found[3] else 1000) ** power)
    if not nbytes:
        raise UserError(f"--memory {text}", expected="a size, as in 2GB, 1.5GiB or 500MB")
    return nbytes


def spelled(nbytes: float) -> str:
    """Bytes as a user would give them, rounded up: "1.3GB"."""
    unit, size = ("GB", 10**8) if nbytes >= 10**9 else ("MB", 10**6)
    count = -(-int(nbytes) // size)
    return f"{count / 10:g}{unit}" if unit == "GB" else f"{count}{unit}"


def for_export(model: Model, limit: int | None, *, planned: bool = False) -> Budget:
    """The budget of an export. limit: bytes. planned: whether it is by a plan, of which a layer's rounded weights are
    in memory. Raises UserError."""
    if limit is None:
        return UNLIMITED
    numbers = sum(rows * columns for rows, columns in _shapes(model))
    held = WRITER + _outer(model) + 5 * 4 * _channels(model) + (2 * numbers if planned else 0)
    _check(model, limit, held + LEAST_ROWS * _widest(model) * _per_number(model))
    return Budget(_numbers(model, limit - PROCESS - held, model.checkpoint.dtype))


def for_calibration(model: Model, limit: int | None, length: int, dtype: torch.dtype) -> Budget:
    """The budget of a calibration. limit: bytes. length: tokens of the longest sequence. dtype: of the arithmetic.
    Raises UserError."""
    if limit is None:
        return UNLIMITED
    token, number = _per_token(model, dtype), _per_number(model)
    ranges = 3 * 4 * _channels(model)
    sequence = length * token + _scores(model, length, dtype)
    least = ranges + max(_outer(model), sequence + LEAST_ROWS * _widest(model) * number)
    _check(model, limit, least)
    room = limit - PROCESS - ranges - sequence  # a third each for longer slices, longer batches, and hidden states
    more = max(0, room // 3) // (length * token)
    return Budget(_numbers(model, room // 3, dtype), (1 + more) * length, room // 3)


def for_validation(model: Model, limit: int | None, length: int, engines: int) -> Budget:
    """The budget of the float model beside the W8A8 forms of so many engines, whose layers are held as they are; what
    the engines themselves hold is not counted. limit: bytes. length: tokens of the longest sequence. Raises
    UserError."""
    if limit is None:
        return UNLIMITED
    shapes = _shapes(model)
    numbers, largest = (find(rows * columns for rows, columns in shapes) for find in (sum, max))
    sequence = length * (_per_token(model, torch.float32) + 6 * 4 * model.geometry.vocab_size)
    held = 3 * 4 * _channels(model) + sequence + _scores(model, length, torch.float32)
    held += _outer(model) + engines * numbers + 12 * largest
    _check(model, limit, held + LEAST_ROWS * _widest(model) * _per_number(model))
    room = limit - PROCESS - held
    return Budget(_numbers(model, room // 2, model.checkpoint.dtype), length, room // 2)


def check_search(model: Model) -> None:
    """Raise UserError where this machine visibly lacks the memory of a search, which holds a layer as it is stored and
    in float32."""
    free, numbers = free_memory(), sum(rows * columns for rows, columns in _shapes(model))
    least = PROCESS + numbers * (model.checkpoint.dtype.itemsize + torch.float32.itemsize)
    if free is not None and free < least:
        raise UserError(
            f"{spelled(free)} of free memory: too little to search {model.checkpoint.folder}",
            expected=f"at least {spelled(least)} for a layer, beside the second moments of its inputs",
            do="calibrate instead, which --memory bounds, or search on a larger machine",
        )


def _check(model: Model, limit: int, least: int) -> None:
    """Raise UserError for a limit that is too low. least: what is held in any case beside the process."""
    least += PROCESS
    if limit < least:
        raise UserError(
            f"--memory {spelled(limit)}: too little for {model.checkpoint.folder}",
            expected=f"at least {spelled(least)}, the least that would do for this command with these options",
            do="give more, or drop --memory to hold a whole layer",
        )


def _numbers(model: Model, room: int, dtype: torch.dtype) -> int | None:
    """The numbers of a slice that fits into so many bytes, or of the smallest useful one; None where a layer does.
    dtype: of a layer in memory."""
    shapes = [rows * columns for rows, columns in _shapes(model)]
    if room >= sum(shapes) * dtype.itemsize + max(shapes) * _per_number(model):
        return None
    return max(LEAST_ROWS * _widest(model), room // _per_number(model))


def _per_number(model: Model) -> int:
    return 2 * model.checkpoint.dtype.itemsize + WIDENED


def _shapes(model: Model) -> list[tuple[int, int]]:
    return [model.family.shape(role, model.geometry) for role in model.roles]


def _widest(model: Model) -> int:
    return max(columns for _, columns in _shapes(model))


def _channels(model: Model) -> int:
    """Numbers of all inputs and outputs of the matrices on disk."""
    shapes = [
        (
            sum(model.family.shape(role, model.geometry)[0] for role in roles),
            model.family.shape(roles[0], model.geometry)[1],
        )
        for roles in model.stored.values()
    ]
    return model.geometry.layers * sum(rows + columns for rows, columns in shapes)


def _outer(model: Model) -> int:
    """Bytes for some rows of the embedding or the head, as stored, widened, and rounded; and for a few logits."""
    return 400 * model.geometry.vocab_size + ROWS * model.geometry.embedded_size * (
        2 * model.checkpoint.dtype.itemsize + 8
    )


def _per_token(model: Model, dtype: torch.dtype) -> int:
    """Bytes of one token in a layer: what its linears read and make, and what listeners make of that."""
    geometry = model.geometry
    inner = (4 if model.family.gated else 3) * geometry.intermediate_size
    return dtype.itemsize * (6 * geometry.hidden_size + 3 * geometry.query_size + inner)


def _scores(model: Model, length: int, dtype: torch.dtype) -> int:
    """Bytes of the scores of one sequence, where a mask of its own makes them whole."""
    geometry = model.geometry
    masked = model.family.alibi or geometry.attention_softcap or any(kind.window for kind in geometry.attention)
    return (4 if masked else 0) * geometry.heads * length**2 * max(4, dtype.itemsize)
