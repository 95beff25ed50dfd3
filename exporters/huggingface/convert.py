"""Turn an INT8 folder into the other dialect, tensor by tensor; no int8 number changes.

What is not quantized keeps its dtype. A pre_quant_scale is folded (`smoothquant.int8_fold`), since compressed-tensors
has no place for it. One layer is in memory at a time, and an interrupted conversion goes on at the layer where it
stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from exporters.card import FORMS, card
from exporters.huggingface.dialects import Dialect
from exporters.turns import AFTER, BEFORE, Turn, in_turn
from smoothquant.artifacts.card import CARD
from smoothquant.artifacts.record import as_json
from smoothquant.artifacts.safetensors_files import Planned
from smoothquant.artifacts.shards import MAX_SHARD, SafetensorsShards
from smoothquant.errors import CheckpointError, UserError
from smoothquant.files import write_json, write_text
from smoothquant.fold import SmoothedLayer
from smoothquant.int8_checkpoint import BIAS, INPUT_SCALE, WEIGHT, WEIGHT_SCALE
from smoothquant.int8_fold import fold_layer
from smoothquant.int8_model import Int8Model
from smoothquant.model import Model
from smoothquant.quantization import is_finite
from smoothquant.scheme import WEIGHTS, Scheme
from smoothquant.sidecars import copy_sidecars
from smoothquant.workspace import Workspace

STEP = "convert"
Progress = Callable[[int, int], None]  # (done, total)


@dataclass(frozen=True)
class ConvertInputs:
    """What a conversion starts from. found, to: dialects. model, sidecars: fingerprints of the INT8 folder."""

    family: str
    found: str
    to: str
    scheme: Scheme
    model: str
    sidecars: str


def convert(
    source: Int8Model,
    to: Dialect,
    out: str | Path,
    *,
    overwrite: bool = False,
    max_shard: int = MAX_SHARD,
    progress: Progress = lambda done, total: None,
) -> None:
    """Write an INT8 folder in a dialect to the folder `out`.

    Raises UserError for a form that the dialect does not have, CheckpointError, which names the linear, for a
    pre_quant_scale that cannot be folded and for scales that are no steps.
    """
    scheme = _scheme(source, to)
    checkpoint, model = source.checkpoint, source.model
    for index in range(model.geometry.layers if checkpoint.smoothed else 0):
        fold_layer(source, index)  # so that what does not fold is said before anything is written
    found, family = checkpoint.quantized.dialect, model.family.name
    inputs = ConvertInputs(family, found, to.name, scheme, checkpoint.fingerprint, checkpoint.sidecars)
    with Workspace(out, STEP, as_json(inputs), overwrite=overwrite) as work:
        if not work.finished:
            _Conversion(source, to, scheme, work, max_shard).run(progress)
            work.commit(geometry=model.facts())


def _scheme(source: Int8Model, to: Dialect) -> Scheme:
    """The scheme of the output: a scale per matrix becomes the same scale for each of its channels."""
    folder, found = source.checkpoint.folder, source.scheme
    if source.checkpoint.quantized.dialect == to.name:
        raise UserError(f"{folder}: it is in the form of {to.name} already", expected="the other form")
    scheme = replace(found, weights=WEIGHTS["per-channel"])
    if not to.holds(scheme):
        raise UserError(
            f"{folder}: {found.activations.form} activations, whose scales are found at run time",
            expected=f"static ones, which are all that {to.name} has",
            do="quantize the float model anew: smoothquant export modelopt",
        )
    return scheme


class _Conversion:
    """One run. Tensors are written in the order of the file (`exporters.turns`)."""

    def __init__(self, source: Int8Model, to: Dialect, scheme: Scheme, work: Workspace, max_shard: int) -> None:
        self.source, self.model, self.to, self.scheme, self.work = source, source.model, to, scheme, work
        self.layer_of = dict(_layers(self.model))
        plan: dict[str, Planned] = {}
        layers: dict[str, int | None] = {}
        for name, shape in self.model.expected().items():
            planned = {name: Planned(shape, self.model.info(name).dtype)}
            if self._is_int8(name):
                planned = to.plan(name.removesuffix(WEIGHT), shape, scheme)
            plan |= planned
            layers |= dict.fromkeys(planned, self.layer_of.get(name))
        work.require(sum(planned.nbytes for planned in plan.values()))
        self.plan, self.names = plan, in_turn(layers)
        self.files = SafetensorsShards(work, plan, max_shard)

    def run(self, progress: Progress) -> None:
        """Write every tensor and the small files."""
        work, count = self.work, self.model.geometry.layers
        if work.next_layer == 0:
            self._write_outer(BEFORE)
        for index in range(work.next_layer, count):
            progress(index, count)
            for name, tensor in self._layer(index):
                self.files.write(name, self._checked(name, tensor))
            if work.due:
                work.mark(index + 1)
        self._write_outer(AFTER)
        in_float = [*self.model.float_linears(), *self.scheme.float_linears]
        for name, content in self.to.says(self.model.checkpoint.config, self.scheme, in_float).items():
            write_json(work.path(name), content)
        checkpoint = self.source.checkpoint
        made = {
            "converted from": checkpoint.quantized.dialect,
            "fingerprint of the folder it was converted from": checkpoint.fingerprint,
        }
        write_text(work.path(CARD), card(self.model, self.scheme, FORMS[self.to.name], made))
        copy_sidecars(checkpoint.folder, work)
        progress(count, count)

    def _is_int8(self, name: str) -> bool:
        return self.model.info(name).dtype == torch.int8

    def _write_outer(self, turn: Turn) -> None:
        for name in self.names[turn]:
            self.files.write_rows(name, self.model.rows(name))

    def _layer(self, index: int) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor of a layer by its name."""
        model, layer = self.model, fold_layer(self.source, index)
        for role, norm in layer.norms.items():
            yield model.norm(index, role) + WEIGHT, norm.weight
            if norm.bias is not None:
                yield model.norm(index, role) + BIAS, norm.bias
        for name, roles in model.stored.items():
            full = model.family.module(index, name)
            if roles[0] in layer.source.weights:
                yield full + WEIGHT, model.join(name, {role: layer.weight(role) for role in roles})
            else:
                yield from self._matrix(layer, name, full)
            biases = {role: bias for role in roles if (bias := layer.bias(role)) is not None}
            if biases:
                yield full + BIAS, model.join(name, biases)

    def _matrix(self, layer: SmoothedLayer, name: str, full: str) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors of an int8 matrix. Rows that feed a folded input have another scale."""
        linear = self.source.linear(full)
        if self.to.positive and not bool((linear.weight_scale > 0).all()):
            raise CheckpointError(
                f"{self.source.checkpoint.folder}: {full} has weight_scales below 0",
                expected="scales above 0, which are all that TensorRT takes",
                do="quantize the float model anew: smoothquant export modelopt",
            )
        scales = self.model.split(name, linear.weight_scale)
        divided = {role: scale / layer.row[role] if role in layer.row else scale for role, scale in scales.items()}
        yield full + WEIGHT, linear.weight
        yield full + WEIGHT_SCALE, self.to.shaped(WEIGHT_SCALE, self.model.join(name, divided))
        if linear.input_scale is not None:
            yield full + INPUT_SCALE, self.to.shaped(INPUT_SCALE, linear.input_scale)

    def _checked(self, name: str, tensor: Tensor) -> Tensor:
        rounded = tensor.to(self.plan[name].dtype)
        if not is_finite(rounded) or (name.endswith(WEIGHT_SCALE) and not bool(rounded.all())):
            raise CheckpointError(
                f"{self.source.checkpoint.folder}: {name} with its pre_quant_scale folded leaves {rounded.dtype}",
                expected="numbers that its dtype holds",
                do="quantize the float model anew",
            )
        return rounded


def _layers(model: Model) -> Iterator[tuple[str, int]]:
    """Yield the name of every tensor of the layers, and its layer."""
    for index in range(model.geometry.layers):
        for role in model.family.norms:
            yield from ((model.norm(index, role) + end, index) for end in (WEIGHT, BIAS))
        for name in model.stored:
            yield from ((model.family.module(index, name) + end, index) for end in (WEIGHT, BIAS))
