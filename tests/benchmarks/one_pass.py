"""Three formats in one pass, against the three exports one after another: time and peak memory.

    python -m tests.benchmarks.one_pass [--hidden 2048] [--layers 8] [--rounds 5] [--before CHECKOUT]

Model: a random Llama, bfloat16, a vocabulary of 32000. Every export is a process of its own, through the command line,
start and imports included. In a round the pass and the three exports take turns, and change places from round to
round; of the rounds' ratios the median. Seconds of processors are told beside those of the clock: other work on the
machine does not count in them. --before: a checkout of an earlier version, whose three exports take part, too.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from act_scales.store import ActScales
from recipes.families import open_model
from recipes.synthetic import save_random_llama
from tests.benchmarks.export_memory import Measured, measured
from tests.benchmarks.results import Row, publish

TARGETS = ("w8a8", "onnx", "trtllm")
PASS, ALONE, BEFORE = "one pass", "three exports", "three exports before"
LIMIT = 0.45
HERE = Path(__file__).parents[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--before", type=Path)
    arguments = parser.parse_args()
    together = [word for target in TARGETS for word in ("--target", target)]
    commands = {PASS: (HERE, [together]), ALONE: (HERE, [[target] for target in TARGETS])}
    if arguments.before:
        commands[BEFORE] = (arguments.before.resolve(), commands[ALONE][1])
    rounds: list[dict[str, list[Measured]]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        os.environ["SMOOTHQUANT_CACHE"] = str(folder / "cache")
        size = made(folder, arguments.hidden, arguments.layers)
        for number in range(-1, arguments.rounds):
            order = sorted(commands, reverse=number % 2 == 0)
            found = {what: [export(folder, commands[what][0], words) for words in commands[what][1]] for what in order}
            if number >= 0:  # in the first, the fingerprint of the model is taken
                rounds.append(found)
    what = f"export to {', '.join(TARGETS)} in one pass, {size / 1e9:.2f} GB bf16"
    rows = [
        Row(f"peak memory, {what}", f"{max(one.peak for found in rounds for one in found[PASS]):.0f} MB"),
        Row(f"time, {what}, to the three exports", ratio(rounds, ALONE)),
    ]
    if arguments.before:
        commit = subprocess.check_output(["git", "-C", arguments.before, "rev-parse", "--short", "HEAD"], text=True)
        told = f"time, {what}, to the three exports of {commit.strip()}, before it"
        rows.append(Row(told, ratio(rounds, BEFORE), f"<= {LIMIT}x"))
    details = [{name: [one._asdict() for one in each] for name, each in found.items()} for found in rounds]
    publish("one_pass", rows, {"rounds": details})


def made(folder: Path, hidden: int, layers: int) -> int:
    """Make a model and act scales. Returns the size of the model in bytes."""
    sizes = {"hidden": hidden, "intermediate": hidden * 43 // 16, "heads": hidden // 64, "kv_heads": hidden // 64}
    save_random_llama(folder / "model", layers=layers, **sizes)
    linears = open_model(folder / "model").linears()
    ActScales({name: torch.rand(shape[1]) + 0.5 for name, shape in linears}).save(folder / "scales.safetensors")
    return (folder / "model/model.safetensors").stat().st_size


def export(folder: Path, checkout: Path, words: Sequence[str]) -> Measured:
    """One export, whose output is removed."""
    given = [str(folder / name) for name in ("model", "scales.safetensors")]
    command = [sys.executable, "-m", "recipes.cli", "export", *words, *given, "--out", str(folder / "out"), "--quiet"]
    found = measured(command, {"PYTHONPATH": str(checkout)})
    shutil.rmtree(folder / "out")
    return found


def ratio(rounds: Sequence[Mapping[str, Sequence[Measured]]], base: str) -> str:
    """The time of a pass over that of a base, by the clock and in seconds of processors, in words."""

    def total(found: Mapping[str, Sequence[Measured]], what: str, part: str) -> float:
        return sum(getattr(one, part) for one in found[what])

    ratios = [total(found, PASS, "seconds") / total(found, base, "seconds") for found in rounds]
    busy = [total(found, PASS, "processor") / total(found, base, "processor") for found in rounds]
    ours, theirs = (statistics.median(total(found, what, "seconds") for found in rounds) for what in (PASS, base))
    spread = f"{min(ratios):.2f} to {max(ratios):.2f}; {ours:.1f} s against {theirs:.1f} s"
    return f"{statistics.median(ratios):.2f}x ({spread}); processors {statistics.median(busy):.2f}x"


if __name__ == "__main__":
    main()
