"""Check a checkpoint folder by the rules of TensorRT-LLM's loader, before a GPU is spent on it.

config.json     keys, names, and numbers that contradict each other (`builders.tensorrt_llm.format.rules`)
rank files      missing, broken and surplus files
tensors         missing ones and wrong shapes, which the loader refuses; wrong dtypes and surplus tensors
values          NaN and Inf in floats; scales that are not > 0; smoothers that are 0
ranks           tensors that every rank of a stage must share, but that differ
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from builders.tensorrt_llm.format.checkpoint import Header, RankFile, rank_file, read_config
from builders.tensorrt_llm.format.config import CheckpointConfig, parse
from builders.tensorrt_llm.format.findings import CONFIG, ERROR, WARNING, FormatFinding, errors
from builders.tensorrt_llm.format.rules import config_findings
from builders.tensorrt_llm.format.tensors import DIVISOR, PLAIN, SCALE, Expected, expected
from smoothquant.errors import CheckpointError

CHUNK = 1 << 24  # the number of elements that are checked at a time
Progress = Callable[[int, int], None]  # (done, total)


def check(folder: str | Path, progress: Progress = lambda done, total: None) -> list[FormatFinding]:
    """All errors and warnings about a checkpoint folder. progress: called with (ranks done, all ranks)."""
    folder = Path(folder)
    try:
        content = read_config(folder)
    except CheckpointError as error:
        return [FormatFinding(ERROR, CONFIG, error.what.removeprefix(f"{folder / CONFIG}: "), error.expected)]
    found = config_findings(content)
    if errors(found):
        return found  # tensors can only be checked against a valid configuration
    config = parse(content)
    found += _files(folder, config)
    shared: dict[tuple[int, str], Tensor] = {}
    for rank in range(config.ranks):
        progress(rank, config.ranks)
        if rank_file(folder, rank).exists():
            found += _rank(folder, config, rank, shared)
    progress(config.ranks, config.ranks)
    return found


def _files(folder: Path, config: CheckpointConfig) -> Iterator[FormatFinding]:
    needed = [rank_file(folder, rank).name for rank in range(config.ranks)]
    there = {path.name for path in folder.glob("rank*.safetensors")}
    for name in needed:
        if name not in there:
            yield FormatFinding(ERROR, name, "no such file", f"{config.ranks} rank files, as mapping says")
    for name in sorted(there - set(needed)):
        yield FormatFinding(WARNING, name, "not loaded", f"{config.ranks} rank files, as mapping says")


def _rank(
    folder: Path, config: CheckpointConfig, rank: int, shared: dict[tuple[int, str], Tensor]
) -> Iterator[FormatFinding]:
    name = rank_file(folder, rank).name
    try:
        file = RankFile(folder, rank)
    except CheckpointError as error:
        yield FormatFinding(ERROR, name, error.what.partition(": ")[2], error.expected)
        return
    headers, demanded = file.headers, expected(config, rank)
    for tensor, wanted in demanded.items():
        if tensor not in headers:
            if not wanted.optional:
                yield FormatFinding(ERROR, f"{name} {tensor}", "missing", _described(wanted))
            continue
        bad = list(_header(headers[tensor], wanted))
        yield from (FormatFinding(severity, f"{name} {tensor}", what, wished) for severity, what, wished in bad)
        if any(severity == ERROR for severity, _, _ in bad) or headers[tensor].dtype not in _READABLE:
            continue
        values = file[tensor]
        fault = _values(values, wanted)
        if fault:
            yield FormatFinding(ERROR, f"{name} {tensor}", *fault)
        if not wanted.split and config.tp > 1:
            key = (rank // config.tp, tensor)
            if not torch.equal(shared.setdefault(key, values).flatten(), values.flatten()):
                first = rank_file(folder, rank // config.tp * config.tp).name
                yield FormatFinding(
                    ERROR, f"{name} {tensor}", f"differs from {first}'s", "the same tensor on every rank of a stage"
                )
    for tensor in headers:
        if tensor not in demanded:
            yield FormatFinding(WARNING, f"{name} {tensor}", "is not read", "no such tensor")


_READABLE = frozenset({torch.int8, torch.float16, torch.bfloat16, torch.float32})


def _header(found: Header, wanted: Expected) -> Iterator[tuple[str, str, str]]:
    if not wanted.fits(found.shape):
        yield ERROR, f"has shape {list(found.shape)}", str(list(wanted.shape))
    if found.dtype != wanted.dtype:
        floats = found.dtype in _READABLE - {torch.int8} and wanted.dtype != torch.int8
        yield (WARNING if floats else ERROR), f"is {_name(found.dtype)}", _name(wanted.dtype)


def _values(values: Tensor, wanted: Expected) -> tuple[str, str] | None:
    """The fault in the values of a tensor and the values expected; None without a fault."""
    if values.dtype == torch.int8:
        return None
    flat = values.flatten()
    for part in flat.split(CHUNK):
        if not part.isfinite().all():
            index = int((~flat.isfinite()).nonzero()[0])
            return f"holds {flat[index].item()}, first at {index}", "finite numbers"
    if wanted.role == SCALE and not (flat > 0).all():
        index = int((flat <= 0).nonzero()[0])
        return f"holds {flat[index].item():g}, first at {index}", "scales > 0"
    if wanted.role == DIVISOR and not (flat != 0).all():
        return f"holds 0, first at {int((flat == 0).nonzero()[0])}", "factors that are not 0"
    assert wanted.role in (PLAIN, SCALE, DIVISOR)
    return None


def _described(wanted: Expected) -> str:
    return f"{_name(wanted.dtype)} {list(wanted.shape)}"


def _name(dtype: torch.dtype | str) -> str:
    return str(dtype).removeprefix("torch.")
