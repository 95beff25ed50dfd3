"""One pass over the quantized layers, many formats.

    the system        reads the next layer from the disk
    the caller        runs a layer, chooses its scales, runs it smoothed, and quantizes it on the way
    a thread          hands what is quantized to every writer
    another thread    hashes what is written (`smoothquant.data_file`)

A format is a `Writer`. All writers of a pass see the same layers; each has its own `Workspace`, and an interrupted
pass goes on at the first layer that some writer had not noted. A weight is smoothed and quantized some rows at a time:
as many as the budget has room for, or else all of them. Rows are handed on when those before are written, and a layer
is noted when all of it is written.

The contract runs each layer twice, as it is stored and smoothed, and both runs are of use: the first finds what scales
are chosen from, the second makes the rows. So a weight is read twice where the layer does not fit into the budget (and
once more where all its rows share a scale).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from exporters.explained import explain_head, explain_layer
from smoothquant import float16
from smoothquant.artifacts.manifest import Origin, Promise
from smoothquant.artifacts.record import as_json
from smoothquant.artifacts.safetensors_files import save_tensors
from smoothquant.artifacts.smoothing_file import ENDS, SMOOTHING
from smoothquant.behind import Behind
from smoothquant.capacity import Capacity
from smoothquant.contract import TOLERANCE, Contract
from smoothquant.errors import ActScalesError, UserError
from smoothquant.head import UNPLANNED, PlannedHead
from smoothquant.layers import float_layer
from smoothquant.machine import return_freed_tensors
from smoothquant.memory import UNLIMITED, Budget
from smoothquant.model import Model
from smoothquant.plan import Plan
from smoothquant.readahead import expect_layer
from smoothquant.scheme import Precision, Scheme
from smoothquant.settings import SmoothingSettings
from smoothquant.static import linears_to_keep
from smoothquant.steps import DEFAULT, Step, as_records
from smoothquant.stream import (
    MeasuredLayer,
    QuantizedLayer,
    QuantizingLayer,
    SmoothedLayer,
    WeightRows,
    check_scales,
    smooth_layer,
)
from smoothquant.workroom import require_room
from smoothquant.workspace import Workspace

PLANNED: Mapping[str, Callable[[Scheme], str]] = {  # parts of a scheme that a plan decides -> what they are, in words
    "weights": lambda scheme: f"{scheme.weights.form} weights",
    "activations": lambda scheme: f"{scheme.activations.form} activations",
    "kv_cache": lambda scheme: f"a KV cache in {_form(scheme.kv_cache)}",
}
Progress = Callable[[int, int], None]  # (done, total)


class Writer(Protocol):
    """A format. Layers arrive in order; every one lands where it would land in an uninterrupted run.

    step: name of the step, as in "export onnx". out: folder to make.
    smoothing: what the format holds of it.
    wider: what to do where float16 is too small.
    """

    step: str
    out: Path
    smoothing: Capacity
    wider: str

    @property
    def schemes(self) -> tuple[Scheme, ...]:
        """What is INT8 in each of its graphs, which share their weights."""
        ...

    @property
    def options(self) -> Mapping[str, Any]:
        """Options of the format, by their name in `Origin`."""
        ...

    def held(self, model: Model) -> torch.dtype:
        """The dtype of the activations that its engines keep between their kernels."""
        ...

    def check(self, source: Source) -> None:
        """Raise UserError if this format cannot hold this model, quantized like this."""
        ...

    def nbytes(self, model: Model) -> int:
        """Size of the output, about."""
        ...

    def begin(self, source: Source, work: Workspace) -> None:
        """Prepare the files; what an interrupted run left in the workspace is still there. Where no layer is done
        yet, write what lies before the layers: files are hashed in the order of their bytes."""
        ...

    def write_rows(self, layer: SmoothedLayer, rows: WeightRows) -> None:
        """Write some rows of one of a layer's weights. Those of a weight arrive in order."""
        ...

    def write(self, layer: SmoothedLayer, quantized: QuantizedLayer | None) -> None:
        """Write all of a layer but the weights. quantized: its scales and biases by `schemes`; None where its weights
        are float."""
        ...

    def end(self) -> None:
        """Write what lies behind the layers, and the small files beside the weights."""
        ...


@dataclass(frozen=True)
class Source:
    """What every export starts from.

    input_absmax: linear -> float32 (in,); None where nothing is smoothed and no static scale is wanted.
    output_absmax: linear -> float32 (out,), of those that are known; some formats want it.
    fingerprints: of the model and of the act scales, for the manifest.
    steps: what is done to every layer between smoothing and storing.
    held_absmax: layer or head -> float32 (1,), see `smoothquant.float16`; empty where it is not known.
    input_mean_square: linear -> float32 (in,), see `act_scales.mean_squares`; empty where it is not known.
    plan: what a search has chosen for this model, with these settings.
    budget: what may be in memory.
    """

    model: Model
    settings: SmoothingSettings
    input_absmax: Mapping[str, Tensor] | None = None
    fingerprints: Mapping[str, str] = field(default_factory=dict)
    output_absmax: Mapping[str, Tensor] = field(default_factory=dict)
    steps: tuple[Step, ...] = DEFAULT
    held_absmax: Mapping[str, Tensor] = field(default_factory=dict)
    input_mean_square: Mapping[str, Tensor] = field(default_factory=dict)
    plan: Plan | None = None
    budget: Budget = UNLIMITED

    def kept(self, choice: str, progress: Progress = lambda done, total: None) -> tuple[str, ...]:
        """Module names of the linears to leave in float where activations are static: `static.linears_to_keep`."""
        if choice not in self._kept:  # several formats ask, and it reads the whole model
            self._kept[choice] = linears_to_keep(
                choice,
                self.model,
                self.input_absmax,
                self.settings,
                self.input_mean_square,
                self.steps,
                progress,
                self.budget,
            )
        return self._kept[choice]

    @cached_property
    def _kept(self) -> dict[str, tuple[str, ...]]:
        return {}

    def head(self, writer: Writer) -> PlannedHead:
        """What the plan says of the output head that a writer's graphs share; nothing where it is in float."""
        return self._head if writer.schemes[0].head.quantized else UNPLANNED

    @cached_property
    def _head(self) -> PlannedHead:
        return self.plan.head(self.model) if self.plan else UNPLANNED


def export(
    source: Source,
    writers: Sequence[Writer],
    *,
    overwrite: bool = False,
    progress: Progress = lambda done, total: None,
) -> None:
    """Write every format in one pass over the layers; finished outputs with the same inputs are left alone.

    Each output also holds the smoothing file (`smoothquant.artifacts.smoothing_file`), so that an artifact explains
    itself and can be compared with its float original.
    """
    for writer in writers:
        writer.check(source)
        writer.smoothing.check(source.settings, source.model)
        if source.plan:
            _check_plan(source.plan, writer)
        if holds_float16(writer, source):
            float16.check_held(source.model, source.held_absmax, str(writer.out), writer.wider)
    check_scales(source.model, source.input_absmax, source.settings)
    with ExitStack() as stack:
        todo = []
        for writer in writers:
            work = stack.enter_context(Workspace(writer.out, writer.step, _inputs(source, writer), overwrite=overwrite))
            if not work.finished:
                todo.append((writer, work))
        require_room([(work, writer.nbytes(source.model)) for writer, work in todo])
        if todo:
            _run(source, todo, progress)


def holds_float16(writer: Writer, source: Source) -> bool:
    """Whether engines of a writer's output keep activations in float16."""
    return writer.held(source.model) == torch.float16


def check_static(source: Source, out: Path, *, always: bool = False) -> None:
    """Raise ActScalesError unless there is what static activations are computed from. always: the format has no
    others."""
    if source.input_absmax is None:
        raise ActScalesError(
            f"{out}: static activations, and no activation scales",
            expected="a file made by smoothquant calibrate",
            do="give ACT_SCALES" + ("" if always else ", or use --act per-token"),
        )


def check_outputs(source: Source, why: str) -> None:
    """Raise ActScalesError unless the range of every linear's output is known."""
    for name, _ in source.model.linears():
        if name not in source.output_absmax:
            raise ActScalesError(
                f"{why} without the range of the outputs of {name}",
                expected="output_absmax of every linear, which published .pt scales do not have",
                do="calibrate this model: smoothquant calibrate MODEL --text FILE --out SCALES",
            )


def _check_plan(plan: Plan, writer: Writer) -> None:
    """Raise UserError unless a writer's graphs are what a plan is for. The output head may be in float or in INT8 by
    any plan; which linears stay in float is a point on its curve."""
    wanted = plan.facts.scheme
    for scheme in writer.schemes:
        for part, words in PLANNED.items():
            if scheme.quantized and getattr(scheme, part) != getattr(wanted, part):
                raise UserError(
                    f"{writer.out}: {words(scheme)}, by a plan for another target ({plan.folder})",
                    expected=f"{words(wanted)}, as the plan has it",
                    do="search for this target, or export without the plan",
                )


def _form(precision: Precision) -> str:
    """A precision in words."""
    return f"{precision.dtype}, {precision.granularity}" if precision.quantized else precision.dtype


def _inputs(source: Source, writer: Writer) -> dict:
    family = source.model.family.name
    made_from: Mapping[str, Any] = {
        **source.fingerprints,
        "plan": source.plan.fingerprint if source.plan else None,
        "sidecars": source.model.checkpoint.sidecars,
        **source.model.choices,
        **writer.options,
        "steps": as_records(source.steps),
    }
    return as_json(Origin(family, source.settings, writer.schemes, **made_from))


def _run(source: Source, todo: Sequence[tuple[Writer, Workspace]], progress: Progress) -> None:
    """Write every format that is not finished, and give each its name. todo: writers, each with its workspace."""
    return_freed_tensors()
    model, layers = source.model, source.model.geometry.layers
    _, last = min(todo, key=lambda pair: pair[1].next_layer)
    start, kept = last.next_layer, last.state()
    smoothing = {name: tensor for name, tensor in kept.items() if name.endswith(ENDS)}
    progress(start, layers)
    with Behind() as behind:
        behind.do(_begin, source, todo)
        contract = Contract(model, kept)
        for index in range(start, layers):
            lacking = [(writer, work) for writer, work in todo if work.next_layer <= index]
            layer = _smoothed(source, index, contract)
            if source.budget.numbers is None:  # else its memory is for the layer itself, which is read twice
                expect_layer(model, index + 1)
            _write_layer(source, layer, [writer for writer, _ in lacking], contract, behind)
            smoothing.update(explain_layer(model, layer))
            del layer  # the thread has it
            for work in [work for _, work in lacking if work.due]:
                behind.wait()
                work.mark(index + 1, {**contract.state(), **smoothing})
            progress(index + 1, layers)
        heads = [source.head(writer) for writer, _ in todo]
        errors = {id(head): contract.finish(head) for head in {id(head): head for head in heads}.values()}
        behind.wait()
    for (writer, work), head in zip(todo, heads, strict=True):
        writer.end()
        save_tensors(work.path(SMOOTHING), smoothing | explain_head(model, head))
        work.commit(contract=Promise(errors[id(head)], TOLERANCE), geometry=model.facts())


def _begin(source: Source, todo: Sequence[tuple[Writer, Workspace]]) -> None:
    for writer, work in todo:
        writer.begin(source, work)


def _smoothed(source: Source, index: int, contract: Contract) -> SmoothedLayer:
    """A smoothed layer, whose stored form the contract has run."""
    stored = float_layer(source.model, index, numbers=source.budget.numbers)
    contract.run_original(stored if source.plan else MeasuredLayer(stored))
    absmax, outputs = source.input_absmax or {}, source.output_absmax
    return smooth_layer(source.model, index, absmax, source.settings, outputs, source.steps, stored, source.plan)


def _write_layer(
    source: Source, layer: SmoothedLayer, writers: Sequence[Writer], contract: Contract, behind: Behind
) -> None:
    """Quantize a layer and check its contract, while every writer writes what is quantized."""
    for writer in writers:
        if holds_float16(writer, source):
            float16.check_layer(layer, str(writer.out), writer.wider)
    wanted = dict.fromkeys(_weights(writer) for writer in writers)

    def hand(rows: WeightRows) -> None:
        behind.do(_write_rows, writers, layer, rows)

    quantizing = QuantizingLayer(layer, [weights for weights in wanted if weights.quantized], hand)
    contract.run_smoothed(layer, quantizing)
    behind.do(_write, writers, layer, quantizing.rest())


def _write_rows(writers: Sequence[Writer], layer: SmoothedLayer, rows: WeightRows) -> None:
    for writer in writers:
        writer.write_rows(layer, rows)


def _write(writers: Sequence[Writer], layer: SmoothedLayer, quantized: Mapping[Precision, QuantizedLayer]) -> None:
    for writer in writers:
        writer.write(layer, quantized.get(_weights(writer)))


def _weights(writer: Writer) -> Precision:
    """How a writer's graphs hold their weights."""
    return writer.schemes[0].weights
