"""What digests cost an export: W8A8 of layers as wide as a 7B model's, with them and without, in one run, in turns.

    python -m tests.benchmarks.integrity_cost [--layers 2] [--rounds 3]

Model: a random Llama of the width of Llama-2-7B (4096, 11008, 32 heads), bfloat16, a few layers of its 32 (all layers
cost the same), a vocabulary of 32000. Without: `files.feed`, which takes every SHA-256, does nothing. Ratios are of
wall times within a round; of the rounds the median. The fingerprint of the model, which is taken once and then
remembered, is told apart, with the rate at which it is read.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from unittest import mock


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
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
        took = time.perf_counter() - began
        rate = model.checkpoint.nbytes / took / 1e9
        print(f"fingerprint: {model.checkpoint.nbytes / 1e9:.2f} GB in {took:.2f} s, {rate:.2f} GB/s")
        scales = {name: torch.ones(columns) for name, (_, columns) in model.linears()}
        source = Source(model, SmoothingSettings(), scales, {"model": fingerprint})

        def seconds() -> float:
            began = time.perf_counter()
            export(source, [W8A8Writer(folder / "out")], overwrite=True)
            return time.perf_counter() - began

        seconds()
        ratios = []
        for round_ in range(arguments.rounds):
            whole = seconds()
            with mock.patch.object(files, "feed", return_value=None):
                plain = seconds()
            ratios.append(whole / plain)
            print(f"round {round_ + 1}: with digests {whole:.2f} s, without {plain:.2f} s, ratio {ratios[-1]:.3f}")
        print(f"median ratio {statistics.median(ratios):.3f}")


if __name__ == "__main__":
    main()
