"""What several GPUs say to each other in a layer, and what that makes of their speed: computed, not measured.

    one process    read and products (of calibration and validation the longer one: a thread reads ahead), rounding
    R processes    read + products of 1 / R of the sequences + rounding of the fullest turn + messages

The sizes are those of 128 x 2048 tokens of a Llama; a batch is a sequence. Not counted: what is divided as products are
(attention, maxima), and what every step does once (start, embedding, head, the pass backward of a search).

A search is its pass over all of the text and three trials of `TRIAL` sequences. It rounds on the CPU, whose cores ranks
share, and ranks take turns at the inputs of a layer, of which there are four: of eight ranks four have none.

Objects (`Team.gathered`) go by gloo also between GPUs, each padded to the largest; a large sum (`Team.total_of`) goes
by NCCL. The rates are assumptions: of products half of an A100's data sheet; of all cores thirty times what rounding
reached on one (35 GFLOP/s, 2048 channels and rows); the others are round numbers. llm-compressor's speed-up is what its
release notes tell, without the model or the machine.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from act_scales.search.search import TRIAL
from act_scales.search.statistics import SAMPLE
from builders.validate.layers import TOKENS as HEARD
from smoothquant.team import Team

SEQUENCES, LENGTH, RANKS, TRIALS = 128, 2048, (2, 4, 8), 3
STEPS = ("calibrate", "search", "search but for rounding", "validate")
HALF, FULL = 156e12, 9.7e12  # FLOP/s of a GPU: bfloat16 in a calibration, float32 in the other steps
HOST = 1e12  # FLOP/s of all cores, float32
READ = 5e9  # bytes a second that each rank reads, from the page cache or a disk that it shares
GLOO = 1e9  # bytes a second that each rank sends to others of its machine
PUBLISHED = "llm-compressor 0.11.0's release notes tell 2.9 to 3.2 times on 4 GPUs, for SmoothQuant and AWQ: measured."
LINKS = {"NVLink": 300e9, "PCIe": 25e9}  # bytes a second that each GPU sends


@dataclass(frozen=True)
class Shapes:
    """The linears of a layer: for each input its channels, and the rows of the linears that read it together."""

    inputs: tuple[tuple[int, tuple[int, ...]], ...]

    @property
    def weights(self) -> int:
        """Numbers in the matrices."""
        return sum(channels * sum(rows) for channels, rows in self.inputs)

    @property
    def maxima(self) -> int:
        """Bytes of what a calibration puts together: maxima, float32, and mean squares, float64."""
        return sum(12 * channels * len(rows) + 4 * sum(rows) for channels, rows in self.inputs)

    @property
    def squares(self) -> int:
        """Numbers in the second moments."""
        return sum(channels**2 for channels, _ in self.inputs)

    def rounding(self, ranks: int) -> float:
        """Seconds that error feedback takes on shared cores: for the factors of a Hessian, and for its rows."""
        work = [2 / 3 * channels**3 + channels**2 * sum(rows) for channels, rows in self.inputs]
        return max(sum(Team(rank, ranks).turns(work)) for rank in range(ranks)) * ranks / HOST

    def rounded(self, ranks: int) -> int:
        """Bytes of the int8 weights of the fullest turn."""
        numbers = [channels * sum(rows) for channels, rows in self.inputs]
        return max(sum(Team(rank, ranks).turns(numbers)) for rank in range(ranks))


def llama(hidden: int, kv: int, intermediate: int) -> Shapes:
    """The shapes of a Llama's layer."""
    return Shapes(
        ((hidden, (hidden, kv, kv)), (hidden, (hidden,)), (hidden, (intermediate,) * 2), (intermediate, (hidden,)))
    )


MODELS = {"Llama-2-7B": llama(4096, 4096, 11008), "Llama-2-70B": llama(8192, 1024, 28672)}


@dataclass(frozen=True)
class Messages:
    """Bytes that each rank sends in a layer. objects: by gloo. sums: by NCCL."""

    objects: float
    sums: float = 0.0

    def seconds(self, link: str) -> float:
        """How long they take. link: of `LINKS`."""
        return self.objects / GLOO + self.sums / LINKS[link]


def messages(shapes: Shapes, step: str, ranks: int) -> Messages:
    """What each rank sends in a layer; of a search, in one pass. step: of `STEPS`."""
    others, channels = ranks - 1, sum(width for width, _ in shapes.inputs)
    if step == "calibrate":
        return Messages(others * shapes.maxima)
    if step == "validate":
        return Messages(others * 4 * channels)
    sampled = 4 * SAMPLE / ranks * channels
    return Messages(others * (shapes.maxima + sampled + shapes.rounded(ranks)), 2 * others / ranks * 8 * shapes.squares)


def tokens(ranks: int, sequences: int = SEQUENCES) -> int:
    """Those of the rank that has most."""
    return math.ceil(sequences / ranks) * LENGTH


def seconds(shapes: Shapes, step: str, ranks: int, link: str = "NVLink") -> float:
    """How long a layer takes. ranks: 1 for a process alone. link: of `LINKS`."""
    read, told = 2 * shapes.weights / READ, messages(shapes, step, ranks).seconds(link)
    if step == "calibrate":
        return max(read, 2 * shapes.weights * tokens(ranks) / HALF) + told
    if step == "validate":  # the first rank alone has the tokens that the errors of linears are heard on
        return max(read, 2 * shapes.weights * (tokens(ranks) + 2 * HEARD) / FULL) + told
    rounding = shapes.rounding(ranks) if step == "search" else 0.0
    heard = tokens(ranks) + TRIALS * tokens(ranks, TRIAL)
    products = (4 * shapes.weights + shapes.squares) * heard / FULL
    return products + (1 + TRIALS) * (read + rounding + told)


def speedups(shapes: Shapes, step: str, link: str = "NVLink") -> Mapping[int, float]:
    """By ranks, how many times as fast they are as one process."""
    return {ranks: seconds(shapes, step, 1) / seconds(shapes, step, ranks, link) for ranks in RANKS}


def table() -> str:
    """A line per model and step."""
    most = RANKS[-1]
    lines = [
        f"| computed, {SEQUENCES} x {LENGTH} tokens | a layer in one process | each of {most} sends by gloo, by NCCL | "
        f"and takes for it, {', '.join(LINKS)} | times as fast on {', '.join(map(str, RANKS))} GPUs |",
        "|---|---|---|---|---|",
    ]
    for name, shapes in MODELS.items():
        for step in STEPS:
            told, passes = messages(shapes, step, most), 1 + TRIALS if step.startswith("search") else 1
            sent = f"{_size(passes * told.objects)}, {_size(passes * told.sums)}"
            taken = ", ".join(_seconds(passes * told.seconds(link)) for link in LINKS)
            times = ", ".join(f"{found:.1f}" for found in speedups(shapes, step).values())
            lines.append(f"| {name}, {step} | {_seconds(seconds(shapes, step, 1))} | {sent} | {taken} | {times} |")
    rates = (
        f"{HALF / 1e12:.0f} and {FULL / 1e12:.1f} TFLOP/s of a GPU in bfloat16 and float32, {HOST / 1e12:.0f} of all "
        f"cores, {READ / 1e9:.0f} GB/s read by each rank, {GLOO / 1e9:.0f} GB/s by gloo, "
        + " and ".join(f"{rate / 1e9:.0f} by {link}" for link, rate in LINKS.items())
    )
    return "\n".join([*lines, "", f"(Assumed: {rates}. {PUBLISHED})"]) + "\n"


def _seconds(value: float) -> str:
    return f"{value:.0f} s" if value >= 10 else f"{value:.1f} s" if value >= 0.1 else f"{value * 1e3:.1f} ms"


def _size(nbytes: float) -> str:
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.1f} MB" if nbytes else "nothing"
