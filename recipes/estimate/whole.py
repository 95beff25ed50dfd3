"""All steps of a run, against the memory and the disk that are there."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from exporters.export import Writer
from recipes.estimate import memory
from recipes.estimate.rates import Rates, measure_rates
from recipes.estimate.sizes import ModelSizes, Tokens
from recipes.estimate.steps import StepCost, StepsOfRun
from smoothquant.errors import OutputError
from smoothquant.machine import free_memory
from smoothquant.model import Model
from smoothquant.workroom import SLACK

SMALL = 64 << 10  # bytes of a manifest, a card, a config
CALIBRATE, SEARCH = "calibrate", "search"  # one takes the place of the other


@dataclass(frozen=True)
class Export:
    """One export of a pass. label: its name. writer: its writer. more: bytes of linears that a plan may leave in float.
    engines: what is built from it on a CPU. elsewhere: what is built from it on a GPU. validated: how many of its
    engines are, or the export itself."""

    label: str
    writer: Writer
    more: int = 0
    engines: tuple[str, ...] = ()
    elsewhere: tuple[str, ...] = ()
    validated: int = 0

    def nbytes(self, sizes: ModelSizes) -> int:
        """Bytes of the folder."""
        return self.writer.nbytes(sizes.model) + self.more + sizes.smoothing + sizes.sidecars + SMALL


@dataclass(frozen=True)
class EstimatedRun:
    """What is to be estimated.

    out: the folder of the outputs, which need not be there. text: to calibrate or to search on. heldout: to validate
    on. ranges: how a run finds scales, of `CALIBRATE` and `SEARCH`; with both, it is one of them. hessians: bytes for
    the second moments of a search.
    """

    model: Model
    out: Path
    text: Tokens
    heldout: Tokens
    exports: Sequence[Export]
    ranges: tuple[str, ...]
    hessians: int


@dataclass(frozen=True)
class Estimate:
    """What a run takes. free_memory: None where the system does not say. free_disk: bytes, of the disk of `out`."""

    out: Path
    steps: tuple[StepCost, ...]
    rates: Rates
    free_memory: int | None
    free_disk: int

    def way(self, ranges: str) -> tuple[StepCost, ...]:
        """The steps of a run that finds scales like this."""
        return tuple(step for step in self.steps if step.step not in (CALIBRATE, SEARCH) or step.step == ranges)

    @property
    def ways(self) -> tuple[str, ...]:
        """How a run may find scales."""
        return tuple(step.step for step in self.steps if step.step in (CALIBRATE, SEARCH))

    def disk(self, ranges: str) -> int:
        """Bytes that the disk must have free for such a run: what is written, and what a step needs beside it."""
        there = most = 0
        for step in self.way(ranges):
            there += step.written
            most = max(most, there + step.scratch)
        return most + SLACK

    def seconds(self, ranges: str) -> float:
        """The time of such a run, as far as it is known."""
        return sum(step.seconds or 0 for step in self.way(ranges))

    @property
    def too_large(self) -> tuple[StepCost, ...]:
        """The steps that hold more than the memory that is free."""
        return tuple(step for step in self.steps if self.free_memory is not None and step.peak > self.free_memory)

    def check_disk(self) -> None:
        """Raise OutputError if the disk cannot hold such a run, whichever way it goes."""
        needed = min(map(self.disk, self.ways))
        if needed > self.free_disk:
            raise OutputError(
                f"{self.out}: {self.free_disk / 1e9:.1f} GB free on this disk",
                expected=f"{needed / 1e9:.1f} GB",
                do="free some space, or choose an --out on another disk",
            )

    def as_dict(self) -> dict:
        """All of it, for programs."""
        return {
            "steps": [
                {
                    "step": step.step,
                    "memory": step.peak,
                    "memory_by": dict(step.memory),
                    "read": step.read,
                    "written": step.written,
                    "scratch": step.scratch,
                    "seconds": step.seconds,
                    "seconds_by": [dict(way) for way in step.ways],
                    "note": step.note,
                }
                for step in self.steps
            ],
            "disk": {ranges: self.disk(ranges) for ranges in self.ways},
            "seconds": {ranges: self.seconds(ranges) for ranges in self.ways},
            "free_disk": self.free_disk,
            "free_memory": self.free_memory,
            "rates": {name: vars(rate) for name, rate in self.rates.table().items()},
        }


def estimate(asked: EstimatedRun) -> Estimate:
    """Measure this machine, and estimate every step. Raises OutputError where nothing can be written."""
    free = free_memory()
    base, tokenizing = memory.of_process(), memory.of_tokenizing_process()
    sizes, place = ModelSizes(asked.model), existing(asked.out)
    rates = measure_rates(sizes, asked.text, place)
    steps = StepsOfRun(sizes, rates, base, tokenizing)
    costs = [steps.calibrate(asked.text)] if CALIBRATE in asked.ranges else []
    costs += [steps.search(asked.text, asked.hessians)] if SEARCH in asked.ranges else []
    nbytes = {export.label: export.nbytes(sizes) for export in asked.exports}
    costs.append(steps.export(f"export {', '.join(nbytes)}", sum(nbytes.values())))
    engines: dict[str, int] = {}
    for export in asked.exports:
        costs += [steps.build(f"build {name}", nbytes[export.label]) for name in export.engines]
        costs += [
            steps.unknown(f"build {name}", "where it is built: it times kernels there") for name in export.elsewhere
        ]
        engines |= {f"{export.label} {number}": nbytes[export.label] for number in range(export.validated)}
    if engines:
        schemes = len({scheme for export in asked.exports if export.validated for scheme in export.writer.schemes})
        costs.append(steps.validate(asked.heldout, engines, schemes))
    return Estimate(asked.out, tuple(costs), rates, free, shutil.disk_usage(place).free)


def existing(out: Path) -> Path:
    """The folder, or the nearest one on the way to it that is there."""
    place = out.absolute()
    while not place.is_dir():
        place = place.parent
    return place
