"""Two processes of one thread beside one process of one thread, by turns:  python -m tests.benchmarks.team_speed

What is timed is calibration alone, without imports, on a random Llama. A quiet machine with two cores is needed.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.benchmarks.results import Row, publish

LAYERS, HIDDEN, INTERMEDIATE, VOCABULARY = 2, 1024, 2816, 2000
SAMPLES, LENGTH = 48, 512
SMALL = {"TORCH_CPP_LOG_LEVEL": "ERROR", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


def calibrate(folder: Path) -> None:
    """Calibrate as one of the processes that torchrun has started; rank 0 writes how long it took."""
    import torch

    from act_scales.collect import collect
    from act_scales.text import Text
    from recipes.families import open_model
    from smoothquant.torchrun import joined

    torch.set_num_threads(1)
    ids = torch.randint(0, VOCABULARY, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(0))
    model, text = open_model(folder / "model"), Text(tuple(ids), "random")
    with joined() as team:
        team.wait()
        began = time.perf_counter()
        collect(model, text, folder / "scales.safetensors", dtype="float32", device="cpu", overwrite=True, team=team)
        if team.leads:
            (folder / "seconds").write_text(str(time.perf_counter() - began))


def seconds(folder: Path, ranks: int) -> float:
    """How long a calibration takes with so many ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    command += ["-m", "tests.benchmarks.team_speed", "--folder", str(folder)]
    subprocess.run(command, check=True, env={**os.environ, **SMALL})
    return float((folder / "seconds").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="repetitions (default 3)")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.folder:
        calibrate(arguments.folder)
        return
    from recipes.synthetic import save_random_llama

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        save_random_llama(
            folder / "model",
            hidden=HIDDEN,
            layers=LAYERS,
            intermediate=INTERMEDIATE,
            heads=16,
            kv_heads=16,
            vocabulary=VOCABULARY,
        )
        found = [(seconds(folder, 1), seconds(folder, 2)) for _ in range(arguments.rounds)]
    report(found)


def report(found: Sequence[tuple[float, float]]) -> None:
    """Publish the seconds of one and of two ranks, by round."""
    ratios = [one / two for one, two in found]
    one, two = (statistics.median(times) for times in zip(*found, strict=True))
    spread = f"{min(ratios):.2f} to {max(ratios):.2f}; {one:.1f} s against {two:.1f} s"
    what = f"calibration by two processes of one thread beside one, {SAMPLES} x {LENGTH} tokens, hidden {HIDDEN}"
    publish(
        "team_speed", [Row(what, f"{statistics.median(ratios):.2f}x as fast ({spread})", ">= 1.7x")], {"seconds": found}
    )


if __name__ == "__main__":
    main()
