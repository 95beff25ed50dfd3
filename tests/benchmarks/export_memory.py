"""Peak memory of exporting a 1 GB bfloat16 checkpoint (0.5 B parameters: hidden 2048, 8 layers, vocabulary 32000).

Every export is a process of its own, through the command line; its peak resident memory counts everything, torch
included. Target: at most 700 MB.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from act_scales.store import ActScales
from recipes.families import open_model
from recipes.synthetic import save_random_llama
from tests.benchmarks.results import Row, publish

TP1, TP4 = "export trtllm", "export trtllm --tp 4"
TARGETS = {
    "export w8a8": ("w8a8",),
    "export onnx": ("onnx",),
    "export onnx --lm-head int8": ("onnx", "--lm-head", "int8"),
    "export onnx --float": ("onnx", "--float"),
    "export hf": ("hf",),
    TP1: ("trtllm", "--dtype", "bfloat16"),
    TP4: ("trtllm", "--dtype", "bfloat16", "--tp", "4"),
}
LIMIT = 700
TURNS = 3  # of the two whose times are compared, in turns


def main() -> None:
    rows, details, commands = [], {}, {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        save_random_llama(folder / "model", layers=8, intermediate=5504, kv_heads=32)
        scales = folder / "scales.safetensors"
        linears = open_model(folder / "model").linears()
        ActScales({name: torch.rand(shape[1]) + 0.5 for name, shape in linears}).save(scales)
        size = (folder / "model/model.safetensors").stat().st_size
        for what, (target, *options) in TARGETS.items():
            arguments = ["export", target, str(folder / "model"), str(scales), "--out", str(folder / "out"), *options]
            command = [sys.executable, "-m", "recipes.cli", *arguments, "--quiet", "--overwrite"]
            seconds, peak = measured(command)
            commands[what] = command
            rows.append(Row(f"peak memory, {what}, {size / 1e9:.2f} GB bf16", f"{peak:.0f} MB", f"<= {LIMIT} MB"))
            details[what] = {"peak_mb": peak, "seconds": seconds}
            subprocess.run(["rm", "-r", folder / "out"], check=True)
        ratios = []
        for _ in range(TURNS):
            seconds = {}
            for what in (TP1, TP4):
                seconds[what], _ = measured(commands[what])
                subprocess.run(["rm", "-r", folder / "out"], check=True)
            ratios.append(seconds[TP4] / seconds[TP1])
        middle = sorted(ratios)[TURNS // 2]
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        rows.append(Row("time, export trtllm, tp 4 to tp 1", f"{middle:.2f}x ({spread})", "<= 1.5x"))
        details["ratios"] = ratios
    publish("export_memory", rows, details)


def measured(command: list[str]) -> tuple[float, float]:
    """Run a command; returns its seconds and its peak resident memory in MB (10^6 bytes)."""
    begin = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        _, status, usage = _wait(process)
    if status:
        raise SystemExit(f"{' '.join(command)} failed")
    return time.perf_counter() - begin, usage.ru_maxrss * 1024 / 1e6


def _wait(process: subprocess.Popen) -> tuple[int, int, resource.struct_rusage]:
    import os

    pid, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return pid, status, usage


if __name__ == "__main__":
    main()
