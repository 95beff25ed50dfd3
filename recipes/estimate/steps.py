"""The steps of a run: what each holds, reads and writes, and how long each of its ways takes.

calibrate   SHA-256 of the model; for each layer: read it, run all tokens through it
search      passes over the layers: reference, trials, winner, losses, linears in float
export      for each layer: read, smooth, check, quantize; beside it a thread that writes, another that hashes
build       copy the export, load and run it once
validate    the float model and the W8A8 form of each scheme; then the logits of every engine
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from act_scales.search.passes import width_for
from act_scales.search.search import APART, JUDGES, LEAST_SEQUENCES, POINTS, TRIAL
from recipes.estimate import memory
from recipes.estimate.rates import FP32, Rates
from recipes.estimate.sizes import ModelSizes, Tokens
from smoothquant.hidden import IN_MEMORY
from smoothquant.machine import free_memory
from smoothquant.workroom import KEEP_EVERY

TRIALS = 2  # that a search makes as a rule: it stops at the second where that is far behind
Seconds = dict[str, float]


@dataclass(frozen=True)
class StepCost:
    """What one step takes.

    memory: bytes at the peak, by what holds them. read, written: bytes; scratch: bytes on the disk while it works.
    ways: seconds by what takes them, of the threads that go beside each other; the first one is torch's.
    note: what is not known. threads, cores: of torch, and of the machine.
    """

    step: str
    memory: Mapping[str, int]
    read: int = 0
    written: int = 0
    scratch: int = 0
    ways: tuple[Seconds, ...] = ()
    note: str = ""
    threads: int = 1
    cores: int = 1

    @property
    def peak(self) -> int:
        """Bytes of memory at the peak."""
        return sum(self.memory.values())

    @property
    def seconds(self) -> float | None:
        """The time that it takes; None where nobody knows. No longer than the longest way takes alone, and than the
        cores take for all of them."""
        if not self.ways:
            return None
        ways = [sum(way.values()) for way in self.ways]
        return max(*ways, (ways[0] * self.threads + sum(ways[1:])) / self.cores)

    @property
    def bound(self) -> tuple[str, float]:
        """What takes the largest part of the longest way, and its share of that."""
        longest = max(self.ways, key=lambda way: sum(way.values()))
        part = max(longest, key=lambda part: longest[part])
        return part, longest[part] / max(sum(longest.values()), 1e-30)


@dataclass
class StepsOfRun:
    """The costs of the steps of one model on this machine. base: bytes of the process; tokenizing: of one that reads
    text."""

    sizes: ModelSizes
    rates: Rates
    base: int
    tokenizing: int
    _fits: bool = field(init=False)

    def __post_init__(self) -> None:
        self._fits = self.sizes.nbytes < (free_memory() or 0)  # then the system has read it once, and keeps it

    def calibrate(self, text: Tokens) -> StepCost:
        """Act scales."""
        sizes, rates = self.sizes, self.rates
        work = self._fingerprint() | self._read(1) | self._sweep(text.count, rates.compute)
        hidden = sizes.hidden(text.count, rates.compute)
        mapped = hidden > IN_MEMORY
        marks = sizes.layers if mapped else sum(work.values()) / KEEP_EVERY
        work |= {"keeping hidden states": marks * hidden * (1 / rates.write + 1 / rates.sha256)}
        return self._cost(
            "calibrate",
            memory.of_calibration(sizes, text, rates.compute),
            read=2 * sizes.nbytes,
            written=sizes.act_scales,
            scratch=(1 + mapped) * hidden,
            ways=(work,),
            base=self.tokenizing,
        )

    def search(self, text: Tokens, hessians: int) -> StepCost:
        """A plan. hessians: bytes for the second moments of a layer."""
        sizes, rates = self.sizes, self.rates
        apart = text.of(min(APART, text.sequences // LEAST_SEQUENCES))
        chosen, trial = text.of(text.sequences - apart.sequences), text.of(min(TRIAL, text.sequences))
        judges, points = apart.of(min(JUDGES, apart.sequences)), len(POINTS)
        width = width_for(sizes.model, hessians)
        heard = chosen.count + TRIALS * trial.count
        w8a8 = heard + apart.count + TRIALS * judges.count + (points + 1) * apart.count
        flops = 2 * sizes.active * sizes.layers
        passes = 1 + TRIALS
        moments = sum(channels * min(width, channels) for channels in sizes.inputs)
        factors = sum(channels * min(width, channels) ** 2 for channels in sizes.inputs)
        rounded = sum(out * into * min(width, into) for out, into in sizes.shapes.values())
        work = {
            **self._fingerprint(),
            **self._read(passes + 2 + points / 2),
            "float products": flops * (heard + 4 * apart.count) / rates.products[FP32],  # losses: forth and back
            "W8A8 products": flops * w8a8 / rates.int8,
            "all but products": sizes.layers * (heard / self._listened + (w8a8 + 4 * apart.count) * rates.plain),
            "second moments": sizes.layers * heard * moments / rates.products[FP32],
            "rounding": passes * sizes.layers * (rounded + 2 * factors) / rates.products[FP32]
            + (2 * passes + points + 2) * sizes.layers * sizes.layer / rates.quantize,
        }
        return self._cost(
            "search",
            memory.of_search(sizes, text, width),
            read=round((passes + 3) * sizes.nbytes),
            written=sizes.act_scales + sizes.layers * sizes.layer,
            scratch=2 * sizes.hidden(text.count, FP32),
            ways=(work,),
            base=self.tokenizing,
        )

    def export(self, name: str, nbytes: int) -> StepCost:
        """All formats of one pass. nbytes: of all of them."""
        sizes, rates = self.sizes, self.rates
        made = self._read(1) | {"smoothing, checking, quantizing": sizes.layers * sizes.layer / rates.quantize}
        return self._cost(
            name,
            memory.of_export(sizes),
            read=sizes.nbytes,
            written=nbytes,
            ways=(made, {"writing": nbytes / rates.write}, {"SHA-256": nbytes / rates.sha256}),
        )

    def build(self, name: str, nbytes: int) -> StepCost:
        """An engine on the CPU, of an export of so many bytes: read for its SHA-256, copied, hashed, loaded, run."""
        rates = self.rates
        work = {
            "SHA-256": 2 * nbytes / rates.sha256,
            "copying": nbytes * (1 / rates.read + 1 / rates.write),
            "loading": nbytes / rates.read + nbytes / rates.take,
        }
        return self._cost(
            name,
            {"the engine, as it is loaded": 2 * nbytes},
            read=3 * nbytes,
            written=nbytes,
            ways=(work,),
        )

    def unknown(self, name: str, note: str) -> StepCost:
        """A step of which nothing is known here."""
        return StepCost(name, {}, note=note)

    def validate(self, text: Tokens, engines: Mapping[str, int], schemes: int) -> StepCost:
        """Every engine against one pass of the float model. engines: bytes in memory, by label."""
        sizes, rates = self.sizes, self.rates
        flops = 2 * sizes.active * sizes.layers * text.count
        head = 2 * sizes.table * text.count
        work = {
            **self._read(1),
            "float products": flops / rates.products[FP32],
            "W8A8 products": (2 * schemes + len(engines)) * flops / rates.int8,
            "all but products": sizes.layers * text.count * (1 + schemes + len(engines)) * rates.plain,
            "smoothing and quantizing": schemes * sizes.layers * sizes.layer / rates.quantize,
            "logits": (1 + len(engines)) * head / rates.products[FP32]
            + text.sequences * sizes.table * sizes.dtype.itemsize / rates.take,
            "SHA-256": sum(engines.values()) / rates.sha256,
            "loading": 2 * sum(engines.values()) * (1 / rates.read + 1 / rates.take),
        }
        layers = memory.of_validation(sizes, text, schemes)
        largest = memory.of_logits(sizes, text, 2 * max(engines.values(), default=0))
        hidden = {"hidden states": layers["hidden states"]}
        return self._cost(
            "validate",
            max(layers, hidden | largest, key=lambda held: sum(held.values())),
            read=sizes.nbytes + 3 * sum(engines.values()),
            scratch=2 * sizes.hidden((1 + schemes) * text.count, FP32),
            ways=(work,),
            base=self.tokenizing,
        )

    @property
    def _listened(self) -> float:
        """Token-layers/s apart from products, with listeners."""
        return 1 / self.rates.beside

    def _cost(
        self,
        step: str,
        held: Mapping[str, int],
        *,
        read: int,
        written: int = 0,
        scratch: int = 0,
        ways: tuple[Seconds, ...],
        base: int = 0,
    ) -> StepCost:
        whole = {"the process": base or self.base, **held}
        threads, cores = min(torch.get_num_threads(), self.rates.cores), self.rates.cores
        return StepCost(step, whole, read, written, scratch, ways, "", threads, cores)

    def _sweep(self, tokens: int, dtype: torch.dtype) -> Seconds:
        sizes, rates = self.sizes, self.rates
        return {
            "products": 2 * sizes.active * sizes.layers * tokens / rates.products[dtype],
            "attention, norms, statistics": sizes.layers * tokens * rates.beside,
        }

    def _fingerprint(self) -> Seconds:
        """SHA-256 of all tensors, by two threads."""
        rates = self.rates
        rate = min(rates.read, rates.sha256 * min(2, rates.cores))
        return {"SHA-256 of the model": self.sizes.nbytes / rate}

    def _read(self, times: float) -> Seconds:
        """All weights, read and taken into memory, so many times."""
        disk = 0 if self._fits else 1 / self.rates.read
        return {"reading weights": times * self.sizes.nbytes * (1 / self.rates.take + disk)}
