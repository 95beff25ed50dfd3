"""Calibrate and export W8A8: this tool beside llm-compressor, same model, same tokens, same machine, one run.

    python -m tests.benchmarks.calibration_speed --peer-python LLMC/bin/python [--rounds 3]

LLMC is a virtual environment of its own, since llm-compressor pins other versions of transformers:

    python -m venv LLMC && LLMC/bin/pip install torch==2.13.0 && LLMC/bin/pip install llmcompressor==0.14.0.1

Model: a random Llama of 0.5 billion parameters (8 layers, 2048 wide, bfloat16); 16 sequences of 512 random tokens.
Ours: `collect`, then `export` of the W8A8 checkpoint, as `smoothquant calibrate` and `smoothquant export w8a8` do.
Theirs: `oneshot` with SmoothQuantModifier and QuantizationModifier(scheme="W8A8"), in its default settings.
Every measurement is a process of its own, in turns. Work is the wall time from after the imports to the files on
disk; peak is the largest resident size of the process. The bound is the time of the same matrix products alone.
Ratios are taken within a round, and of the rounds the median.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

LAYERS, INTERMEDIATE, HEADS, VOCABULARY = 8, 5504, 16, 32000
SAMPLES, LENGTH, ALPHA = 16, 512, 0.5
ROOT = Path(__file__).resolve().parents[2]


# -- what is measured, each in a process of its own --------------------------------------------------------------------


def make(folder: Path) -> dict:
    """The model, a tokenizer that nobody uses, and the token ids."""
    import torch

    from recipes.synthetic import save_random_llama
    from tests.models import save_tokenizer

    save_random_llama(
        folder / "model", layers=LAYERS, intermediate=INTERMEDIATE, heads=HEADS, kv_heads=HEADS, vocabulary=VOCABULARY
    )
    save_tokenizer(folder / "model")
    ids = torch.randint(0, VOCABULARY, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(0))
    (folder / "ids.json").write_text(json.dumps(ids.tolist()))
    return {}


def ours(folder: Path) -> dict:
    began = time.perf_counter()
    from recipes.cli import set_up_libraries

    set_up_libraries()  # as the command line does, before torch is imported
    import torch

    from act_scales.collect import collect
    from act_scales.text import Text
    from exporters.export import export
    from exporters.huggingface import W8A8Writer
    from recipes.families import open_model
    from recipes.pipeline import source_of
    from smoothquant.settings import SmoothingSettings

    ids = json.loads((folder / "ids.json").read_text())
    imported = time.perf_counter()
    model = open_model(folder / "model")
    collect(model, Text(tuple(torch.tensor(row) for row in ids), "random"), folder / "scales.safetensors")
    calibrated = time.perf_counter()
    source = source_of(model, folder / "scales.safetensors", SmoothingSettings(ALPHA))
    export(source, [W8A8Writer(folder / "ours")])
    return {
        "imports": imported - began,
        "calibrate": calibrated - imported,
        "export": time.perf_counter() - calibrated,
        "work": time.perf_counter() - imported,
    }


def theirs(folder: Path) -> dict:
    began = time.perf_counter()
    from importlib.metadata import version

    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier
    from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier

    ids = json.loads((folder / "ids.json").read_text())
    imported = time.perf_counter()
    oneshot(
        model=str(folder / "model"),
        dataset=Dataset.from_dict({"input_ids": ids, "attention_mask": [[1] * len(row) for row in ids]}),
        recipe=[
            SmoothQuantModifier(smoothing_strength=ALPHA),
            QuantizationModifier(targets="Linear", scheme="W8A8", ignore=["lm_head"]),
        ],
        max_seq_length=LENGTH,
        num_calibration_samples=SAMPLES,
        shuffle_calibration_samples=False,
        output_dir=str(folder / "theirs"),
    )
    return {
        "imports": imported - began,
        "work": time.perf_counter() - imported,
        "version": version("llmcompressor"),
    }


def bound(folder: Path) -> dict:
    """The matrix products of calibration and nothing else, in bfloat16, in the batches of calibration."""
    import torch

    from recipes.families import open_model
    from smoothquant.batches import BATCH_TOKENS

    model = open_model(folder / "model")
    weights = [torch.randn(model.family.shape(role, model.geometry)).bfloat16() for role in model.family.linears]
    inputs = {weight.shape[1]: torch.randn(BATCH_TOKENS, weight.shape[1]).bfloat16() for weight in weights}
    began = time.perf_counter()
    for _ in range(LAYERS * SAMPLES * LENGTH // BATCH_TOKENS):
        for weight in weights:
            torch.nn.functional.linear(inputs[weight.shape[1]], weight)
    return {"work": time.perf_counter() - began}


PARTS: dict[str, Callable[[Path], dict]] = {"make": make, "ours": ours, "theirs": theirs, "bound": bound}


# -- measuring -------------------------------------------------------------------------------------------------------


def measure(part: str, folder: Path, python: str) -> dict:
    """Run one part in a process of its own. Adds to what it returns: peak in bytes, wall of the whole process."""
    report = folder / f"{part}.json"
    command = [python, str(Path(__file__).resolve()), "--part", part, "--folder", str(folder)]
    environment = {**os.environ, "PYTHONPATH": "" if part == "theirs" else str(ROOT), "HF_HUB_OFFLINE": "1"}
    with open(folder / f"{part}.log", "wb") as log:
        output = [(os.POSIX_SPAWN_DUP2, log.fileno(), descriptor) for descriptor in (1, 2)]
        began = time.perf_counter()
        _, status, usage = os.wait4(os.posix_spawn(python, command, environment, file_actions=output), 0)
    if status:
        raise SystemExit(f"{part} failed:\n{(folder / f'{part}.log').read_text()[-3000:]}")
    wall = time.perf_counter() - began
    return {**json.loads(report.read_text()), "wall": wall, "peak": usage.ru_maxrss * 1024}


def quantized(folder: Path) -> int:
    """Number of INT8 tensors in a checkpoint."""
    found = 0
    for file in folder.glob("*.safetensors"):
        with open(file, "rb") as content:
            header = json.loads(content.read(int.from_bytes(content.read(8), "little")))
        found += sum(entry.get("dtype") == "I8" for entry in header.values())
    return found


def measure_all(rounds: int, peer: str) -> dict[str, list[dict]]:
    """Every part once per round, in turns."""
    measured: dict[str, list[dict]] = {"bound": [], "ours": [], "theirs": []}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            measure("make", folder, sys.executable)
            for part, found in measured.items():
                found.append(measure(part, folder, peer if part == "theirs" else sys.executable))
            for part in ("ours", "theirs"):
                assert quantized(folder / part) == 7 * LAYERS, f"{part}: not every linear is INT8"
    return measured


def rows(measured: dict[str, list[dict]]) -> list[tuple[str, str, str]]:
    """What the table says of it: (what, measured, target)."""
    bound, ours, theirs = measured["bound"], measured["ours"], measured["theirs"]

    def ratio(mine: list[dict], key: str, yours: list[dict], other: str) -> str:
        return f"{statistics.median(a[key] / b[other] for a, b in zip(mine, yours, strict=True)):.2f}x"

    def middle(found: list[dict], key: str) -> float:
        return statistics.median(one[key] for one in found)

    peer = f"llm-compressor {theirs[0]['version']}"
    work = f"{middle(ours, 'work'):.1f} s against {middle(theirs, 'work'):.1f} s"
    peak = f"{middle(ours, 'peak') / 1e6:,.0f} MB against {middle(theirs, 'peak') / 1e6:,.0f} MB"
    alone = f"{middle(ours, 'calibrate'):.1f} s against {middle(bound, 'work'):.1f} s"
    return [
        (f"calibrate + export w8a8, time, to {peer}", f"{ratio(ours, 'work', theirs, 'work')} ({work})", "<= 0.6x"),
        (f"calibrate + export w8a8, memory, to {peer}", f"{ratio(ours, 'peak', theirs, 'peak')} ({peak})", "<= 0.5x"),
        (
            "calibrate, time, to its bfloat16 matrix products alone",
            f"{ratio(ours, 'calibrate', bound, 'work')} ({alone})",
            "",
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", metavar="PYTHON", help="python of the environment that holds llm-compressor")
    parser.add_argument("--rounds", type=int, default=3, help="repetitions (default 3)")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        found = PARTS[arguments.part](arguments.folder)
        (arguments.folder / f"{arguments.part}.json").write_text(json.dumps(found))
        return
    if not arguments.peer_python:
        parser.error("--peer-python is needed (see --help for how to make that environment)")
    measured = measure_all(arguments.rounds, arguments.peer_python)

    # imported last: a process starts with the peak memory of the one that started it
    from tests.benchmarks.results import Row, publish

    publish("calibration_speed", [Row(*row) for row in rows(measured)], measured)


if __name__ == "__main__":
    main()
