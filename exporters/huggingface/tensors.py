"""A Hugging Face checkpoint as a plan: name, shape, dtype and content of every tensor, said once, and its writer.

In a layer, a weight comes some rows at a time, and another tensor's content is a function of the layer, smoothed and
quantized. Outside of the layers, it is what the checkpoint holds, read some rows at a time.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from exporters.card import CardForm, write_card
from exporters.export import Source
from exporters.turns import AFTER, BEFORE, Turn, in_turn
from smoothquant.artifacts.safetensors_files import Planned
from smoothquant.artifacts.shards import MAX_SHARD, SafetensorsShards
from smoothquant.capacity import FOLDED
from smoothquant.device import declared_dtype
from smoothquant.errors import ContractError
from smoothquant.files import write_json
from smoothquant.int8_checkpoint import BIAS, WEIGHT
from smoothquant.model import Model
from smoothquant.norms import Norm
from smoothquant.quantization import is_finite
from smoothquant.sidecars import copy_sidecars
from smoothquant.stream import QuantizedLayer, SmoothedLayer, WeightRows
from smoothquant.workspace import Workspace

LayerTensorContent = Callable[[SmoothedLayer, QuantizedLayer | None], Tensor]
RowsContent = Callable[[WeightRows], Tensor]  # what a weight holds of some of a linear's rows


@dataclass(frozen=True)
class CheckpointTensor:
    """One tensor of the output. layer: None outside of the layers. A layer's tensor has `content`, or, if it is a
    weight, `rows`."""

    planned: Planned
    layer: int | None = None
    content: LayerTensorContent | None = None
    rows: RowsContent | None = None


class CheckpointWriter(ABC):
    """Writes a checkpoint to the folder `out` by its plan. form: what its card says of it."""

    smoothing = FOLDED
    form: CardForm
    wider: str

    def __init__(self, out: str | Path, max_shard: int = MAX_SHARD) -> None:
        self.out, self.max_shard = Path(out), max_shard

    @abstractmethod
    def plan(self, model: Model) -> dict[str, CheckpointTensor]:
        """Every tensor by its name, in the order on disk."""

    @abstractmethod
    def config(self, model: Model) -> dict:
        """The config.json of the output."""

    def says(self, model: Model) -> dict[str, dict]:
        """The small JSON files of the output, by name."""
        return {"config.json": self.config(model)}

    def held(self, model: Model) -> torch.dtype:
        return declared_dtype(self.config(model), model.checkpoint.dtype)

    def check(self, source: Source) -> None:  # noqa: B027 (an empty one is meant)
        """Every model has this form."""

    def nbytes(self, model: Model) -> int:
        return sum(tensor.planned.nbytes for tensor in self.plan(model).values())

    def begin(self, source: Source, work: Workspace) -> None:
        self.model, self.work, self.tensors = source.model, work, self.plan(source.model)
        planned = {name: tensor.planned for name, tensor in self.tensors.items()}
        self.files = SafetensorsShards(work, planned, self.max_shard)
        self.names = in_turn({name: tensor.layer for name, tensor in self.tensors.items()})
        if work.next_layer == 0:
            self._write_outer(BEFORE)

    def write_rows(self, layer: SmoothedLayer, rows: WeightRows) -> None:
        name = self.model.linear(layer.index, rows.role) + WEIGHT
        of_rows = self.tensors[name].rows
        assert of_rows is not None  # it is a weight
        content = self._rounded(name, of_rows(rows))
        for part, there in self.model.role_rows(rows.role).runs(rows.rows):
            self.files.write_part(name, content[part], there.start)

    def write(self, layer: SmoothedLayer, quantized: QuantizedLayer | None) -> None:
        for name in self.names[layer.index]:
            content = self.tensors[name].content
            if content is not None:
                self.files.write(name, self._rounded(name, content(layer, quantized)))

    def end(self) -> None:
        self._write_outer(AFTER)
        for name, content in self.says(self.model).items():
            write_json(self.work.path(name), content)
        write_card(self.model, self.work, self.form)
        copy_sidecars(self.model.checkpoint.folder, self.work)

    def _write_outer(self, turn: Turn) -> None:
        for name in self.names[turn]:
            self.files.write_rows(name, (self._rounded(name, rows) for rows in self.model.rows(name)))

    def _rounded(self, name: str, tensor: Tensor) -> Tensor:
        rounded = tensor.to(self.tensors[name].planned.dtype)
        if not is_finite(rounded):
            raise ContractError(
                f"{name}: the smoothed weight overflows {rounded.dtype}",
                do=f"lower alpha, or {self.wider}",
            )
        return rounded


def float_tensors(model: Model, dtype: torch.dtype | None = None) -> dict[str, CheckpointTensor]:
    """All tensors of the smoothed float model. dtype: of all of them; None keeps each one's own."""
    inside = dict(_layers(model))
    return {
        name: CheckpointTensor(Planned(shape, dtype or model.info(name).dtype), *inside.get(name, ()))
        for name, shape in model.expected().items()
    }


def _layers(model: Model) -> Iterator[tuple[str, tuple[int, LayerTensorContent | None, RowsContent | None]]]:
    for layer in range(model.geometry.layers):
        for role in model.family.norms:
            name = model.norm(layer, role)
            yield f"{name}.weight", (layer, _of_norm(role, lambda norm: norm.weight), None)
            yield f"{name}.bias", (layer, _of_norm(role, lambda norm: norm.bias), None)
        for name, roles in model.stored.items():
            full = model.family.module(layer, name)
            yield full + WEIGHT, (layer, None, lambda rows: rows.weight)
            yield full + BIAS, (layer, _of_biases(model, name, roles), None)


def _of_biases(model: Model, name: str, roles: tuple[str, ...]) -> LayerTensorContent:
    """The biases of a matrix's linears, as they lie on disk. name: within the layer."""

    def content(smoothed: SmoothedLayer, _: QuantizedLayer | None) -> Tensor:
        return model.join(name, {role: bias for role in roles if (bias := smoothed.bias(role)) is not None})

    return content


def _of_norm(role: str, part: Callable[[Norm], Tensor | None]) -> LayerTensorContent:
    def content(smoothed: SmoothedLayer, _: QuantizedLayer | None) -> Tensor:
        tensor = part(smoothed.norms[role])
        assert tensor is not None  # a bias is planned for layer norms alone
        return tensor

    return content
