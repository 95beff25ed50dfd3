"""Validation, against what it cannot do without: the float model's pass over the text, and the engine's own.

    python -m tests.benchmarks.validate_speed MODEL ENGINE --text FILE [--plan PLAN] [--samples N] [--rounds 3]

MODEL: a Hugging Face folder. ENGINE: an engine of ONNX Runtime made from it.
Each measurement is a process of its own, in turns: `validate` through the command line, start and imports included; the
same of three engines (links to ENGINE) in one pass; transformers in the dtype that `calibrate` would take here, all
logits, some sequences at a time; and the engine's own logits through ONNX Runtime, both without imports. Of the rounds'
ratios the median. Seconds of processors are told beside those of the clock, since other work on the machine does not
count there.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from act_scales.text import load_text
from builders.engine.table import open_engine
from recipes.families import open_model
from smoothquant.device import choose_dtype
from tests.benchmarks.export_memory import Measured, measured
from tests.benchmarks.results import Row, publish

OURS, THREE, FLOAT, ENGINE = "validate", "validate, three engines", "transformers", "the engine"
LIMIT = 1.5
BATCH = 1024  # tokens that transformers takes at a time, as we do


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("engine", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--plan", type=Path)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--alone", choices=[FLOAT, ENGINE], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.alone:
        alone(arguments)
        return
    sizes = ["--text", str(arguments.text), "--samples", str(arguments.samples), "--length", str(arguments.length)]
    given = ["--reference", str(arguments.model), *sizes, "--no-thresholds", "--quiet"]
    given += ["--plan", str(arguments.plan)] if arguments.plan else []
    ours = [sys.executable, "-m", "recipes.cli", "validate"]
    itself = [sys.executable, "-m", "tests.benchmarks.validate_speed", str(arguments.model), str(arguments.engine)]
    rounds: list[dict[str, Measured]] = []
    with tempfile.TemporaryDirectory() as scratch:
        engines = [str(Path(scratch) / name) for name in ("first", "second", "third")]
        for folder in engines:  # validation says in a folder's card what it has measured
            shutil.copytree(arguments.engine, folder, copy_function=os.link)
        commands = {
            OURS: [*ours, engines[0], *given],
            THREE: [*ours, *engines, *given],
            FLOAT: [*itself, *sizes, "--alone", FLOAT],
            ENGINE: [*itself, *sizes, "--alone", ENGINE],
        }
        for number in range(arguments.rounds):
            order = sorted(commands, reverse=number % 2 == 1)
            rounds.append({what: (apart if what in (FLOAT, ENGINE) else measured)(commands[what]) for what in order})
    tokens = arguments.samples * arguments.length
    what = f"validate {arguments.model.name}, {tokens:,} tokens"
    rows = [
        Row(f"{what}: beyond the engine's own pass, to transformers", beyond(rounds, OURS, 1), f"<= {LIMIT}x"),
        Row(f"{what}: three engines in one pass, beyond theirs", beyond(rounds, THREE, 3)),
        Row(f"{what}: peak memory", f"{statistics.median(found[OURS].peak for found in rounds):.0f} MB"),
    ]
    details = [{what: one._asdict() for what, one in found.items()} for found in rounds]
    publish("validate_speed", rows, {"rounds": details})


def beyond(rounds: list[dict[str, Measured]], what: str, engines: int) -> str:
    """The time of a validation without that of its engines, over that of the float model, in words."""

    def ratios(part: str) -> list[float]:
        return [
            (getattr(found[what], part) - engines * getattr(found[ENGINE], part)) / getattr(found[FLOAT], part)
            for found in rounds
        ]

    seconds = {name: statistics.median(found[name].seconds for found in rounds) for name in (what, ENGINE, FLOAT)}
    told = ", ".join(f"{name} {number:.0f} s" for name, number in seconds.items())
    clock, busy = ratios("seconds"), ratios("processor")
    spread = f"{min(clock):.2f} to {max(clock):.2f}; {told}"
    return f"{statistics.median(clock):.2f}x ({spread}); processors {statistics.median(busy):.2f}x"


def apart(command: list[str]) -> Measured:
    """What a process of `alone` has measured of itself."""
    return Measured(*json.loads(subprocess.check_output(command, text=True).splitlines()[-1]))


def alone(arguments: argparse.Namespace) -> None:
    """Run the float model, or the engine, over the text, and print its `Measured`."""
    text = load_text(str(arguments.text), arguments.model, arguments.samples, arguments.length).sequences
    began, busy = time.perf_counter(), time.process_time()
    if arguments.alone == ENGINE:
        engine = open_engine(arguments.engine)
        for ids in text:
            engine.logits(ids[None])
    else:
        run_float(arguments.model, torch.stack(text))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    print(json.dumps([time.perf_counter() - began, peak, time.process_time() - busy]))


def run_float(folder: Path, ids: Tensor) -> None:
    """Run the float model over sequences, int64 (sequences, tokens)."""
    dtype = choose_dtype("auto", open_model(folder).checkpoint.dtype, "cpu")
    float_model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    with torch.no_grad():
        for batch in ids.split(max(1, BATCH // ids.shape[1])):
            float_model(batch).logits.sum()


if __name__ == "__main__":
    main()
