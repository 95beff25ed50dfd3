"""What a command may hold in memory: `--memory 2GB`.

    least   =  what every command holds  +  what this model asks for in any case  +  the smallest useful slices
    budget  >= least: what is left makes slices longer, batches and hidden states in memory larger

A slice is some rows of one matrix. Without a budget a layer is in memory, and a slice is a whole matrix. What an export
writes does not depend on it. Peaks are resident memory; files that the system keeps in its cache count for nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch

from smoothquant.errors import UserError
from smoothquant.model import ROWS, Model

FORM = re.compile(r"(\d+(?:\.\d+)?) ?([KMGT])(i?)B?", re.IGNORECASE)
PROCESS = 460 << 20  # bytes of the interpreter, torch and what they load: 390 to 430 MB were measured on Linux
LEAST_ROWS = 64  # of the widest matrix, in the smallest useful slice
WIDENED = 18  # bytes for every number of a slice beside those on disk: in float32, smoothed, rounded, and two of them
TOKENS = 16  # of the contract


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


def for_export(model: Model, limit: int | None, *, planned: bool = False, whole: bool = False) -> Budget:
    """The budget of an export. limit: bytes. planned: whether it is by a plan, of which a layer's rounded weights are
    in memory. whole: whether the noise of linears is measured, which takes a layer. Raises UserError."""
    if limit is None:
        return UNLIMITED
    layer, widest = _layer_numbers(model), _widest(model)
    fixed = _outer(model) + 5 * 4 * _channels(model) + _logits(model)
    if planned:
        fixed += 2 * layer
    least = fixed
    if whole:
        largest = max(rows * columns for rows, columns in _shapes(model))
        least = max(fixed, fixed + layer * model.checkpoint.dtype.itemsize + 12 * largest)
    return _made(model, limit, least, fixed, lambda left: Budget(numbers=left), widest)


def for_calibration(model: Model, limit: int | None, length: int, dtype: torch.dtype) -> Budget:
    """The budget of a calibration. limit: bytes. length: tokens of the longest sequence. dtype: of the arithmetic.
    Raises UserError."""
    if limit is None:
        return UNLIMITED
    fixed = _outer(model) + 3 * 4 * _channels(model) + _scores(model, length, dtype)
    token = _per_token(model, dtype)
    room = limit - PROCESS - fixed - length * token
    states = max(0, room // 4)
    more = max(0, room // 4) // (length * token)  # sequences beside the one that there must be
    tokens = (1 + more) * length
    held = fixed + max(length, tokens) * token

    def made(left: int) -> Budget:
        return Budget(left, tokens, states)

    return _made(model, limit, fixed + length * token, held + states, made, _widest(model))


def _made(model: Model, limit: int, least: int, held: int, made: Callable[[int], Budget], widest: int) -> Budget:
    """A budget, or UserError. least: what is held in any case beside the process and a slice. held: what is held with
    this limit. made: makes the budget of the numbers in a slice. widest: columns of the widest matrix."""
    number = 2 * model.checkpoint.dtype.itemsize + WIDENED
    least += PROCESS + LEAST_ROWS * widest * number
    if limit < least:
        raise UserError(
            f"--memory {spelled(limit)}: too little for {model.checkpoint.folder}",
            expected=f"at least {spelled(least)}, the least that would do for this command with these options",
            do="give more, or drop --memory to hold a whole layer",
        )
    return made(max(LEAST_ROWS * widest, (limit - PROCESS - held) // number))


def _shapes(model: Model) -> list[tuple[int, int]]:
    return [model.family.shape(role, model.geometry) for role in model.roles]


def _layer_numbers(model: Model) -> int:
    return sum(rows * columns for rows, columns in _shapes(model))


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
    """Bytes for some rows of the embedding or the head, as stored, widened, and rounded."""
    return ROWS * model.geometry.embedded_size * (2 * model.checkpoint.dtype.itemsize + 8)


def _logits(model: Model) -> int:
    return 6 * 4 * TOKENS * model.geometry.vocab_size


def _per_token(model: Model, dtype: torch.dtype) -> int:
    """Bytes of one token in a layer: what its linears read and make, and what listeners make of that."""
    geometry = model.geometry
    inner = geometry.intermediate_size * max(1, geometry.experts_per_token)
    held = 6 * geometry.hidden_size + 4 * geometry.query_size + (4 if model.family.gated else 3) * inner
    return dtype.itemsize * held + 3 * 4 * max(geometry.intermediate_size, geometry.hidden_size)


def _scores(model: Model, length: int, dtype: torch.dtype) -> int:
    """Bytes of the scores of one sequence, where a mask of its own makes them whole."""
    geometry = model.geometry
    masked = model.family.alibi or geometry.attention_softcap or any(kind.window for kind in geometry.attention)
    return (4 if masked else 0) * geometry.heads * length**2 * max(4, dtype.itemsize)
