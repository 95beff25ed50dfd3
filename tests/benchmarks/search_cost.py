"""What a search costs: its processor time over that of a float32 forward pass over the same text.

python -m tests.benchmarks.search_cost MODEL TEXT     # one thread, so that processor time is what counts
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import torch

from act_scales.search import Wanted, search
from act_scales.text import load_text
from recipes.families import open_model
from smoothquant.settings import SmoothingSettings
from smoothquant.sweep import sweep
from tests.benchmarks.results import Row, publish

SAMPLES, LENGTH = 40, 512  # the defaults of the command
TARGET = 6


def main(folder: str, text_file: str) -> None:
    torch.set_num_threads(1)
    model = open_model(folder)
    text = load_text(text_file, folder, SAMPLES, LENGTH).for_model(model)
    start = time.process_time()
    sweep(model, text.sequences)
    forward = time.process_time() - start
    with tempfile.TemporaryDirectory() as scratch:
        start = time.process_time()
        plan = search(model, text, Path(scratch) / "plan", Wanted(settings=SmoothingSettings(0.85), budget=0.05))
        cost = time.process_time() - start
    told = f"{forward:.0f} s, {cost:.0f} s: {cost / forward:.1f} times"
    tried = {"candidates": [vars(one) for one in plan.facts.candidates], "chosen": plan.facts.chosen}
    details = {"name": Path(folder).name, "tokens": text.tokens, "forward": forward, "search": cost, **tried}
    publish("search_cost", [Row("float32 forward, search", told, f"at most {TARGET} times")], details)


if __name__ == "__main__":
    main(*sys.argv[1:])
