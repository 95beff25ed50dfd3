"""What `smoothquant estimate` says of a run, beside what the run takes: time, memory and disk of every step.

A random Llama (0.3 B parameters: hidden 2048, 4 layers, vocabulary 32000, 0.65 GB in bfloat16), 8 x 512 tokens. The
estimate and every step are processes of their own, through the command line. Memory is a step's peak resident memory,
torch included; disk is what its outputs hold when it has ended. Seconds are by the clock: other work on
the machine counts in the rates that the estimate has measured, and in the run.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from recipes.synthetic import save_random_llama
from tests.benchmarks.export_memory import measured
from tests.benchmarks.results import Row, publish
from tests.models import save_tokenizer

COMMAND = (sys.executable, "-m", "recipes.cli")
AMOUNT = ("--samples", "8", "--length", "512")
TARGETS = ("--target", "w8a8", "--target", "onnx")
WITHIN = 0.25  # of what was measured


def main() -> None:
    rows, details = [], {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        save_random_llama(folder / "model")
        save_tokenizer(folder / "model")
        (folder / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 200)
        estimated = _estimated(folder)
        for step, (words, made) in _steps(folder).items():
            found = measured([*COMMAND, *words, "--quiet"])
            taken = found._asdict() | {"peak": found.peak * 1e6, "written": made and _nbytes(made)}
            details[step] = {"estimated": estimated[step], "measured": taken}
            rows.append(
                Row(f"estimated / measured: {step}", ratios(estimated[step], taken), f"memory within {WITHIN:.0%}")
            )
            publish("estimates", rows, details)  # of those so far


def _estimated(folder: Path) -> dict[str, dict]:
    """What is said of each step, by its name."""
    command = [*COMMAND, "estimate", str(folder / "model"), *AMOUNT, *TARGETS, "--out", str(folder / "out"), "--json"]
    found = subprocess.run([*command, "--quiet"], stdout=subprocess.PIPE, text=True, check=True)
    return {step["step"]: step for step in json.loads(found.stdout)["steps"]}


def _steps(folder: Path) -> dict[str, tuple[list[str], Path | None]]:
    """The command of each step, and what it makes."""
    model, scales, out = str(folder / "model"), folder / "scales.safetensors", folder / "out"
    text, engine = ["--text", str(folder / "text.txt"), *AMOUNT], folder / "engine"
    return {
        "calibrate": (["calibrate", model, *text, "--out", str(scales)], scales),
        "export w8a8, onnx": (["export", *TARGETS, model, str(scales), "--out", str(out)], out),
        "build onnxruntime": (["build", "onnxruntime", str(out / "onnx"), "--out", str(engine)], engine),
        "validate": (["validate", str(engine), "--reference", model, *text, "--no-thresholds"], None),
    }


def _nbytes(made: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    return sum(path.stat().st_size for path in (made, *made.rglob("*")) if path.is_file())


def ratios(said: Mapping[str, float], taken: Mapping[str, float | None]) -> str:
    """How many times of what was taken was said; and what was taken."""
    seconds, peak, written = (taken[name] or 0 for name in ("seconds", "peak", "written"))
    told = [
        f"time {said['seconds'] / seconds:.2f} ({seconds:,.0f} s, {taken['processor']:,.0f} s of processors)",
        f"memory {said['memory'] / peak:.2f} ({peak / 1e6:,.0f} MB)",
    ]
    return ", ".join([*told, f"disk {said['written'] / written:.2f} ({written / 1e6:,.0f} MB)"] if written else told)


if __name__ == "__main__":
    main()
