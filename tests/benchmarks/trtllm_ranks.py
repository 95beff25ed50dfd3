"""Exporting a 1 GB bfloat16 checkpoint for TensorRT-LLM, to one rank and to four: peak memory and time.

The checkpoint is that of `export_memory`. Every export is a process of its own, through the command line; times are
medians over turns. Targets: at most 700 MB, and four ranks in at most 1.5 times the time of one.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

import torch

from act_scales.store import ActScales
from recipes.families import open_model
from recipes.synthetic import save_random_llama
from tests.benchmarks.export_memory import LIMIT, measured
from tests.benchmarks.results import Row, publish

ONE, FOUR = "export trtllm", "export trtllm --tp 4"
TARGETS = (ONE, FOUR, f"{ONE} --tp 2 --pp 2 --act per-tensor --kv int8", f"{ONE} --tp 4 --no-plugins")
RATIO = 1.5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    seconds: dict[str, list[float]] = {what: [] for what in TARGETS}
    peaks: dict[str, list[float]] = {what: [] for what in TARGETS}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        save_random_llama(folder / "model", layers=8, intermediate=5504, kv_heads=32)
        scales = folder / "scales.safetensors"
        linears = dict(open_model(folder / "model").linears())
        ranges = [{name: torch.rand(shape[side]) + 0.5 for name, shape in linears.items()} for side in (1, 0)]
        ActScales(*ranges).save(scales)
        size = (folder / "model/model.safetensors").stat().st_size
        for _ in range(repeats):
            for what in TARGETS:
                options = ["--out", folder / "out", *what.removeprefix(ONE).split(), "--quiet"]
                arguments = ["export", "trtllm", folder / "model", scales, *options]
                took, peak, _ = measured([sys.executable, "-m", "recipes.cli", *map(str, arguments)])
                shutil.rmtree(folder / "out")
                seconds[what].append(took)
                peaks[what].append(peak)
    rows = [
        Row(f"peak memory, {what}, {size / 1e9:.2f} GB bf16", f"{max(peaks[what]):.0f} MB", f"<= {LIMIT} MB")
        for what in TARGETS
    ]
    one, four = (statistics.median(seconds[what]) for what in (ONE, FOUR))
    measured_ratio = f"{four / one:.2f}x ({four:.1f} s against {one:.1f} s)"
    rows.append(Row("time, export trtllm, four ranks to one", measured_ratio, f"<= {RATIO}x"))
    publish("trtllm_ranks", rows, {what: {"seconds": seconds[what], "peak_mb": peaks[what]} for what in TARGETS})


if __name__ == "__main__":
    main()
