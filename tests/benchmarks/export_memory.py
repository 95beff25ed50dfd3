"""Peak memory of exporting a 1 GB bfloat16 checkpoint (0.5 B parameters: hidden 2048, 8 layers, vocabulary 32000).

Every export is a process of its own, through the command line; its peak resident memory counts everything, torch
included. Target: at most 700 MB.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch

from act_scales.store import ActScales
from recipes.families import open_model
from recipes.synthetic import save_random_llama
from tests.benchmarks.results import Row, publish

TARGETS = {
    "export w8a8": ("w8a8",),
    "export onnx": ("onnx",),
    "export onnx --lm-head int8": ("onnx", "--lm-head", "int8"),
    "export onnx --float": ("onnx", "--float"),
    "export hf": ("hf",),
}
LIMIT = 700


def main() -> None:
    rows, details = [], {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        save_random_llama(folder / "model", layers=8, intermediate=5504, kv_heads=32)
        scales = folder / "scales.safetensors"
        linears = open_model(folder / "model").linears()
        ActScales({name: torch.rand(shape[1]) + 0.5 for name, shape in linears}).save(scales)
        size = (folder / "model/model.safetensors").stat().st_size
        for what, (target, *options) in TARGETS.items():
            arguments = ["export", target, str(folder / "model"), str(scales), "--out", str(folder / "out"), *options]
            seconds, peak, _ = measured([sys.executable, "-m", "recipes.cli", *arguments, "--quiet"])
            subprocess.run(["rm", "-r", folder / "out"], check=True)
            rows.append(Row(f"peak memory, {what}, {size / 1e9:.2f} GB bf16", f"{peak:.0f} MB", f"<= {LIMIT} MB"))
            details[what] = {"peak_mb": peak, "seconds": seconds}
    publish("export_memory", rows, details)


class Measured(NamedTuple):
    """A command's seconds by the clock, its peak resident memory in MB (10^6 bytes), and its seconds of processors."""

    seconds: float
    peak: float
    processor: float


def measured(command: list[str], environment: Mapping[str, str] = MappingProxyType({})) -> Measured:
    """Run a command. environment: what it has beyond this process's."""
    begin = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ | environment) as process:
        _, status, usage = _wait(process)
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    seconds = time.perf_counter() - begin
    return Measured(seconds, usage.ru_maxrss * 1024 / 1e6, usage.ru_utime + usage.ru_stime)


def _wait(process: subprocess.Popen) -> tuple[int, int, resource.struct_rusage]:
    pid, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return pid, status, usage


if __name__ == "__main__":
    main()
