"""What digests cost an export: W8A8 of layers as wide as a 7B model's, with them and without, in one run, in turns.

    TMPDIR=/dev/shm python -m tests.benchmarks.integrity_cost [--layers 6] [--rounds 9]

Model: a random Llama of the width of Llama-2-7B (4096, 11008, 32 heads), bfloat16, a few layers of its 32 (all layers
cost the same), a vocabulary of 32000. Without: `files.feed`, which takes every SHA-256, does nothing. Ratios are of
wall times within a round, whose halves change places from round to round; of the rounds the median. In a folder in
memory no wait for a disk hides anything. The fingerprint of the model, which is taken once and then remembered, is told
apart, with the rate at which it is read.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

from tests.benchmarks.results import Row, publish


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=9)
    arguments = parser.parse_args()
    from recipes.cli import set_up_libraries

    set_up_libraries()
    import torch

    from exporters.export import Source, export
    from exporters.huggingface import W8A8Writer
    from recipes.llama import FAMILY
    from recipes.synthetic import save_random_llama
    from smoothquant import files
    from smoothquant.checkpoint import Checkpoint
    from smoothquant.model import Model
    from smoothquant.settings import SmoothingSettings

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ["SMOOTHQUANT_CACHE"] = str(folder / "cache")
        save_random_llama(
            folder / "model", hidden=4096, intermediate=11008, layers=arguments.layers, heads=32, kv_heads=32
        )
        model = Model(Checkpoint(folder / "model"), FAMILY)
        began = time.perf_counter()
        fingerprint = model.checkpoint.fingerprint
        rate = model.checkpoint.nbytes / (time.perf_counter() - began) / 1e9
        scales = {name: torch.ones(columns) for name, (_, columns) in model.linears()}
        source = Source(model, SmoothingSettings(), scales, {"model": fingerprint})

        def seconds(digests: bool) -> float:
            without = mock.patch.object(files, "feed", return_value=None)
            with nullcontext() if digests else without:
                began = time.perf_counter()
                export(source, [W8A8Writer(folder / "out")], overwrite=True)
                return time.perf_counter() - began

        seconds(True)
        rounds = []
        for number in range(arguments.rounds):
            order = (True, False) if number % 2 else (False, True)
            took = {digests: seconds(digests) for digests in order}
            rounds.append({"with": took[True], "without": took[False]})
            print(f"round {number + 1}: with digests {took[True]:.2f} s, without {took[False]:.2f} s")
        size = sum(path.stat().st_size for path in (folder / "out").rglob("*") if path.is_file())
    ratios = [each["with"] / each["without"] for each in rounds]
    what = f"SHA-256 of all that `export w8a8` writes, {arguments.layers} layers of a 7B's width, {size / 1e9:.2f} GB"
    spread = f"{min(ratios):.2f} to {max(ratios):.2f} in {len(ratios)} rounds"
    rows = [
        Row(what, f"{statistics.median(ratios):.3f} of the time without ({spread})", "<= 1.05"),
        Row("fingerprint of a bf16 model, taken once", f"{rate:.1f} GB/s"),
    ]
    publish("integrity_cost", rows, {"rounds": rounds})


if __name__ == "__main__":
    main()
