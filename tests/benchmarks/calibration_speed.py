"""Calibrate and export W8A8: this tool beside llm-compressor, same model, same tokens, same machine, one run.

    python -m tests.benchmarks.calibration_speed --peer-python LLMC/bin/python [--rounds 3] [--json FILE]

LLMC is a virtual environment of its own, since llm-compressor pins other versions of transformers:

    python -m venv LLMC && LLMC/bin/pip install torch==2.13.0 && LLMC/bin/pip install llmcompressor==0.14.0.1

Model: a random Llama of 0.5 billion parameters (8 layers, 2048 wide, bfloat16); 16 sequences of 512 random tokens.
Ours: `collect`, then `export` of the W8A8 checkpoint, as `smoothquant calibrate` and `smoothquant export w8a8` do.
Theirs: `oneshot` with SmoothQuantModifier and QuantizationModifier(scheme="W8A8"), in its default settings.
Every measurement is a process of its own, in turns. Work is the wall time from after the imports to the files on
disk; peak is the largest resident size of the process. The bound is the time of the same matrix products alone.
Targets: work at most 0.6 and peak at most 0.5 of theirs. Without --peer-python only our side is measured.
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

SHAPE = {
    "hidden_size": 2048,
    "intermediate_size": 5504,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "vocab_size": 32000,
}
SAMPLES, LENGTH, ALPHA = 16, 512, 0.5
TARGETS = {"work": 0.6, "peak": 0.5}
ROOT = Path(__file__).resolve().parents[2]


# -- what is measured, each in a process of its own --------------------------------------------------------------------


def make(folder: Path) -> dict:
    """The model, a tokenizer that nobody uses, and the token ids."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.models import save_tokenizer

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(LlamaConfig(**SHAPE)).save_pretrained(folder / "model")
    save_tokenizer(folder / "model")
    ids = torch.randint(0, SHAPE["vocab_size"], (SAMPLES, LENGTH))
    (folder / "ids.json").write_text(json.dumps(ids.tolist()))
    return {}


def ours(folder: Path) -> dict:
    began = time.perf_counter()
    import torch

    from act_scales.collect import collect
    from act_scales.text import Text
    from exporters.export import export
    from exporters.huggingface import W8A8Writer
    from recipes.llama import FAMILY
    from recipes.pipeline import source_of
    from smoothquant.checkpoint import Checkpoint
    from smoothquant.model import Model
    from smoothquant.settings import SmoothingSettings

    ids = json.loads((folder / "ids.json").read_text())
    imported = time.perf_counter()
    model = Model(Checkpoint(folder / "model"), FAMILY)
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
        "versions": {name: version(name) for name in ("llmcompressor", "transformers", "torch")},
    }


def bound(folder: Path) -> dict:
    """The matrix products of calibration and nothing else, in the dtype and the batches of calibration."""
    import torch

    from act_scales.collect import BATCH_TOKENS
    from act_scales.machine import choose_dtype
    from recipes.llama import FAMILY, geometry

    dtype = choose_dtype("auto", torch.bfloat16, "cpu")
    shapes = [FAMILY.shape(role, geometry(SHAPE)) for role in FAMILY.linears]
    weights = [torch.randn(shape).to(dtype) for shape in shapes]
    inputs = {columns: torch.randn(BATCH_TOKENS, columns).to(dtype) for _, columns in shapes}
    times = []
    for _ in range(SHAPE["num_hidden_layers"] * SAMPLES * LENGTH // BATCH_TOKENS):
        began = time.perf_counter()
        for weight in weights:
            torch.nn.functional.linear(inputs[weight.shape[1]], weight)
        times.append(time.perf_counter() - began)
    return {"work": sum(times), "dtype": str(dtype).removeprefix("torch."), "threads": torch.get_num_threads()}


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


def benchmark(rounds: int, peer: str | None) -> dict:
    """All measurements, and medians over the rounds of the ratios within a round."""
    measured: dict[str, list[dict]] = {}
    for _ in range(rounds):
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            measure("make", folder, sys.executable)
            for part, python in (("bound", sys.executable), ("ours", sys.executable), ("theirs", peer)):
                if python:
                    measured.setdefault(part, []).append(measure(part, folder, python))
            for part in ("ours", "theirs")[: 2 if peer else 1]:
                linears = SHAPE["num_hidden_layers"] * 7
                assert quantized(folder / part) == linears, f"{part}: not every linear is INT8"

    def ratio(part: str, key: str, other: str, other_key: str) -> float:
        pairs = zip(measured[part], measured[other], strict=True)
        return statistics.median(mine[key] / yours[other_key] for mine, yours in pairs)

    ratios = {"calibrate to bound": ratio("ours", "calibrate", "bound", "work")}
    if peer:
        ratios |= {f"{key} to theirs": ratio("ours", key, "theirs", key) for key in TARGETS}
    return {"model": SHAPE, "samples": SAMPLES, "length": LENGTH, "measured": measured, "ratios": ratios}


def show(result: dict) -> None:
    """Medians over the rounds, as a table."""
    print(f"{'':10}{'imports':>10}{'calibrate':>11}{'export':>9}{'work':>9}{'process':>9}{'peak':>10}")
    for part, rounds in result["measured"].items():
        cells = []
        for key, width in (("imports", 10), ("calibrate", 11), ("export", 9), ("work", 9), ("wall", 9)):
            known = [found[key] for found in rounds if key in found]
            cells.append(f"{f'{statistics.median(known):.1f} s' if known else '':>{width}}")
        peak = statistics.median(found["peak"] for found in rounds)
        print(f"{part:10}{''.join(cells)}{f'{peak / 1e6:,.0f} MB':>10}")
    for name, value in result["ratios"].items():
        target = TARGETS.get(name.removesuffix(" to theirs"))
        print(f"{name}: {value:.2f}" + (f" (target: at most {target})" if target else ""))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", metavar="PYTHON", help="python of the environment that holds llm-compressor")
    parser.add_argument("--rounds", type=int, default=3, help="repetitions; medians are shown (default 3)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every measurement there")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        found = PARTS[arguments.part](arguments.folder)
        (arguments.folder / f"{arguments.part}.json").write_text(json.dumps(found))
        return
    result = benchmark(arguments.rounds, arguments.peer_python)
    show(result)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
