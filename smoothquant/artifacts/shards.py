"""Write `model.safetensors`, or shards with their index, split like transformers' checkpoints."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

from torch import Tensor

from smoothquant.artifacts.safetensors_files import Planned, SafetensorsFile
from smoothquant.data_file import DataFile
from smoothquant.files import write_json

MAX_SHARD = 5_000_000_000  # bytes, the default of transformers


class Folder(Protocol):
    """Where shards are written: a workspace, for one."""

    def data(self, name: str) -> DataFile:
        """A large file in it."""
        ...

    def path(self, name: str) -> Path:
        """A small one."""
        ...


class SafetensorsShards:
    """`model.safetensors`, or shards of at most `max_shard` bytes with `model.safetensors.index.json`, in a folder.

    plan: the shape and dtype of every tensor by name, in the order on disk. The tensors of an interrupted run are kept.
    """

    def __init__(self, folder: Folder, plan: Mapping[str, Planned], max_shard: int = MAX_SHARD) -> None:
        self.plan = plan
        self._files: dict[str, SafetensorsFile] = {}
        shards = list(_split(plan, max_shard))
        names = [f"model-{n + 1:05}-of-{len(shards):05}.safetensors" for n in range(len(shards))]
        if len(shards) == 1:
            names = ["model.safetensors"]
        for name, tensors in zip(names, shards, strict=True):
            file = SafetensorsFile(folder.data(name), {tensor: plan[tensor] for tensor in tensors})
            self._files |= dict.fromkeys(tensors, file)
        if len(shards) > 1:
            weight_map = {tensor: file.name for tensor, file in self._files.items()}
            size = sum(planned.nbytes for planned in plan.values())
            content = {"metadata": {"total_size": size}, "weight_map": weight_map}
            write_json(folder.path("model.safetensors.index.json"), content)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a whole tensor. Shape and dtype must be as planned."""
        self._files[name].write(name, tensor)

    def write_part(self, name: str, part: Tensor, row: int) -> None:
        """Write some rows of a tensor, from `row` on."""
        self._files[name].write_part(name, part, row)

    def write_rows(self, name: str, parts: Iterable[Tensor]) -> None:
        """Write a tensor that comes some rows at a time."""
        self._files[name].write_rows(name, parts)


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
