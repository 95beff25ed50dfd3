"""What each step holds at its peak, in bytes by what it is, beside the process itself.

Mapped files (hidden states beyond `hidden.IN_MEMORY`) are the system's to drop, and do not count. The formulas are held
against measured runs in `tests/benchmarks/estimates.py`.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from recipes.estimate.sizes import ModelSizes, Tokens
from smoothquant.hidden import IN_MEMORY
from smoothquant.sweep import EMBEDDED

FP32 = torch.float32
INT8 = 1  # bytes of a number
WORKING = 40 << 20  # what threads, allocators and libraries take once they work
TOKENIZER = 120 << 20  # what transformers imports as it loads a tokenizer
Bytes = dict[str, int]


def of_process() -> int:
    """What a command of this tool holds before it works: what this process holds, and a little."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    except OSError:  # not Linux
        return WORKING
    return pages * os.sysconf("SC_PAGE_SIZE") + WORKING


def of_tokenizing_process() -> int:
    """The same of a command that reads text."""
    return of_process() + TOKENIZER


def of_calibration(sizes: ModelSizes, text: Tokens, dtype: torch.dtype) -> Bytes:
    """Hidden states, a layer in the dtype of the arithmetic, and what a batch has inside it."""
    layer = {
        "a layer": sizes.layer * dtype.itemsize,
        "a batch": max(sizes.matrix * sizes.dtype.itemsize, _batch(sizes, text, dtype)),
    }
    return (
        _hidden(sizes, text.count, dtype)
        | {"statistics": sizes.act_scales}
        | _larger(_embedding(sizes, text, dtype), layer)
    )


def of_search(sizes: ModelSizes, text: Tokens, width: int) -> Bytes:
    """Second moments of all inputs of a layer, and either the layer in float32, or linears as they are rounded.

    width: channels of a block of second moments.
    """
    widest = min(width, max(sizes.inputs))
    rounding = 3 * sizes.side_by_side * FP32.itemsize + sizes.layer * INT8 + 4 * FP32.itemsize * widest**2
    hearing = sizes.layer * FP32.itemsize + _batch(sizes, text, FP32)
    inner = {
        "a layer as stored": sizes.layer * sizes.dtype.itemsize,
        "second moments": 4 * sum(channels * min(width, channels) for channels in sizes.inputs),
    }
    last = {"the layer in float32": hearing} if hearing > rounding else {"linears as they are rounded": rounding}
    states = {"hidden states": sizes.hidden(text.count, FP32), "statistics": sizes.act_scales}  # always in memory
    return states | _larger(_embedding(sizes, text, FP32), inner | last)


def of_export(sizes: ModelSizes) -> Bytes:
    """A layer as stored and in INT8, and beside it a linear in float32, twice, or the next layer as it is read."""
    floats = {"a linear in float32, twice": 2 * sizes.linear * FP32.itemsize}
    following = {"the next layer as it is read": sizes.layer * sizes.dtype.itemsize}
    return {
        "a layer as stored": sizes.layer * sizes.dtype.itemsize,
        "a layer in INT8": sizes.layer * INT8,
        "scales": sizes.act_scales + 2 * sizes.smoothing,
        **_larger({"pieces of the head": 2 * sizes.piece * FP32.itemsize}, _larger(floats, following)),
    }


def of_validation(sizes: ModelSizes, text: Tokens, schemes: int) -> Bytes:
    """The float reference, and beside it one form of the layer for each scheme; hidden states of each."""
    forms = 1 + schemes
    return _hidden(sizes, forms * text.count, FP32) | {
        "a layer as stored": sizes.layer * sizes.dtype.itemsize,
        "a layer in INT8 for each scheme": schemes * sizes.layer * INT8,
        "a linear in float32, twice": 2 * sizes.linear * FP32.itemsize,
        "a batch": forms * _batch(sizes, text, FP32),
        "statistics": 2 * sizes.smoothing,
    }


def of_logits(sizes: ModelSizes, text: Tokens, engine: int) -> Bytes:
    """An engine of so many bytes, and the logits of a sequence, of both sides and compared."""
    return {"the engine": engine, "logits of a sequence": 6 * text.length * sizes.geometry.vocab_size * FP32.itemsize}


def _hidden(sizes: ModelSizes, tokens: int, dtype: torch.dtype) -> Bytes:
    nbytes = sizes.hidden(tokens, dtype)
    return {"hidden states": nbytes if nbytes <= IN_MEMORY else 0}


def _embedding(sizes: ModelSizes, text: Tokens, dtype: torch.dtype) -> Bytes:
    """The hidden states of some tokens as they are made, and pieces of the table."""
    made = min(sizes.hidden(text.count, dtype), EMBEDDED)
    return {"embeddings as they are made": 3 * made + 2 * sizes.piece * sizes.dtype.itemsize}


def _batch(sizes: ModelSizes, text: Tokens, dtype: torch.dtype) -> int:
    """What a batch has inside a layer: the MLP's inner states, or attention's, and float32 copies for statistics."""
    geometry = sizes.geometry
    inner = (3 if sizes.model.family.gated else 2) * geometry.intermediate_size
    attention = 2 * (geometry.query_size + 2 * geometry.kv_size)
    statistics = 2 * FP32.itemsize * max(geometry.intermediate_size, geometry.hidden_size)
    return text.batch * (dtype.itemsize * (3 * geometry.hidden_size + max(inner, attention)) + statistics)


def _larger(one: Bytes, other: Bytes) -> Bytes:
    """What is held at the larger of two times."""
    return max((one, other), key=lambda held: sum(held.values()))
