"""What may happen to a layer between smoothing and storing: a list of records, each a function of layers.

    layer = step(layer)

An export records its steps in the manifest. What they make of scales and ranges is in the smoothing file, and read from
there; what they make of weights, `SmoothedLayer.edits`, validation makes again. So it measures the engine that exists,
however it was clipped or rounded.

A new step is a frozen dataclass of JSON values with a name, entered in `STEPS`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import torch

from smoothquant.artifacts.record import as_json, read
from smoothquant.errors import UserError
from smoothquant.fold import SmoothedLayer
from smoothquant.roles import parsed


class Step(Protocol):
    """One step. Its fields are JSON values that say all of it.

    A step changes ranges and scales at once. It changes weights by an `Edit`, which is called when a weight is
    quantized, with the layer as it is stored: what an edit reads there is the same in an export and in validation.
    """

    name: ClassVar[str]

    def __call__(self, layer: SmoothedLayer) -> SmoothedLayer:
        """The layer after this step; the one that is given stays as it is."""
        ...


@dataclass(frozen=True)
class BorrowRanges:
    """An expert that no token of the calibration reached takes the range of its layer's other experts."""

    name: ClassVar[str] = "borrow-ranges"

    def __call__(self, layer: SmoothedLayer) -> SmoothedLayer:
        found = dict(layer.input_absmax)
        silent = [role for role, range_ in found.items() if parsed(role).expert is not None and not range_.any()]
        for role in silent:
            kind = parsed(role).kind
            others = [range_.amax() for other, range_ in found.items() if parsed(other).kind == kind]
            found[role] = torch.stack(others).amax().expand_as(found[role]).clone()
        return replace(layer, input_absmax=found)


STEPS: dict[str, type[Step]] = {BorrowRanges.name: BorrowRanges}
DEFAULT: tuple[Step, ...] = (BorrowRanges(),)


def run_steps(steps: Sequence[Step], layer: SmoothedLayer) -> SmoothedLayer:
    """The layer after all steps, in order."""
    for step in steps:
        layer = step(layer)
    return layer


def replay(steps: Sequence[Step], layer: SmoothedLayer) -> SmoothedLayer:
    """A layer folded from recorded scales, with the edits of its weights; recorded ranges stay as they are."""
    return replace(layer, edits=run_steps(steps, layer).edits)


def as_records(steps: Sequence[Step]) -> tuple[dict[str, Any], ...]:
    """Steps as JSON values, for the manifest. Raises UserError for one that validation could not do again."""
    for step in steps:
        if STEPS.get(step.name) is not type(step):
            raise UserError(
                f"step {step.name!r} between smoothing and storing is not entered in smoothquant.steps.STEPS",
                expected=f"one of {', '.join(STEPS)}",
                do="enter it there: validation finds a step by the name in the manifest",
            )
    return tuple({"name": step.name, **as_json(step)} for step in steps)


def from_records(records: Sequence[Mapping[str, Any]]) -> tuple[Step, ...]:
    """The steps of a manifest. Raises UserError for one that this version does not know."""
    return tuple(map(_step, records))


def _step(record: Mapping[str, Any]) -> Step:
    fields = dict(record)
    name = fields.pop("name", None)
    if name not in STEPS:
        raise UserError(
            f"step {name!r} between smoothing and storing",
            expected=f"one of {', '.join(STEPS)}",
            do="use the version of this tool that made the folder, or export it again",
        )
    return read(STEPS[name], fields, f"step {name!r}")
