"""An INT8 cache beside a float one behind 2,048 tokens: speed, memory and accuracy, in two loops and two attentions.

    python -m tests.benchmarks.int8_cache MODEL PLAN INT8_PLAN --text FILE --work DIR [--rounds 7 --samples 8]

MODEL: a Hugging Face folder. PLAN, INT8_PLAN: folders that `search` made of it, the second with `--kv int8`; each is
exported and built with standard and with grouped attention in DIR, unless it is there already. Loops: `generate`'s own,
and onnxruntime-genai.

Speed: seconds of a step, all loops in one process, which take turns; ratios are of times next to each other. Seconds of
processors are told beside those of the clock, since other work on the machine does not count there. Memory: each loop
in a process of its own. A piece of 256 tokens comes first, which brings weights and buffers into memory; then a prompt
of 2,048, in such pieces, whose resident memory counts beyond that, and whose time is taken once. Accuracy: `validate`,
on FILE.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median, quantiles

import numpy
import onnxruntime_genai
import torch

from builders.engine.generation import PIECE, pieces
from builders.onnxruntime import OnnxRuntimeEngine
from builders.onnxruntime.record import ATTENTION, STANDARD
from smoothquant.reading import read_json
from tests.benchmarks.results import Row, publish

TOKENS, STEPS = 2048, 8
GENERATE, GENAI = "generate", "onnxruntime-genai"
FLOAT, INT8 = "float", "int8"
SECONDS, PROCESSORS = "seconds", "processors"
Append = Callable[[Sequence[int]], object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("plan", type=Path)
    parser.add_argument("int8_plan", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    if sys.argv[1:2] == ["--alone"]:
        alone(sys.argv[2], Path(sys.argv[3]))
        return
    arguments = parser.parse_args()
    load, _, _ = os.getloadavg()
    details: dict[str, object] = {"load_of_other_work": load}
    name = arguments.model.name
    folders = engines(arguments.model, {FLOAT: arguments.plan, INT8: arguments.int8_plan}, arguments.work)
    details["speed"] = speed = speeds(folders, arguments.rounds)
    details["memory"] = memory = {
        f"{loop}, {engine}": json.loads(tool("tests.benchmarks.int8_cache", "--alone", loop, str(folder)))
        for engine, folder in folders.items()
        for loop in (GENERATE, GENAI)
    }
    details["cache_bytes"] = sizes = [cache_bytes(folders, cache) for cache in (FLOAT, INT8)]
    found = [Row(f"{name}: load of other work as its INT8 cache was measured", f"{load:.1f}")]
    found += rows(name, speed, memory, sizes)
    publish("int8_cache", found, details)  # of those so far
    details["metrics"] = metrics = accuracies(folders, arguments)
    publish("int8_cache", [*found, *accuracy_rows(name, metrics)], details)


def tool(module: str, *arguments: str) -> str:
    """What a module of ours prints, in a process of its own."""
    return subprocess.check_output([sys.executable, "-m", module, *arguments], text=True)


def engines(model: Path, plans: dict[str, Path], work: Path) -> dict[str, Path]:
    """The engines by cache and attention, FLOAT-standard and so on."""
    folders = {}
    for cache, plan in plans.items():
        if not (work / cache).exists():
            tool("recipes.cli", "export", "onnx", str(model), str(plan), "--out", str(work / cache), "--quiet")
        for attention in ATTENTION:
            folders[f"{cache}-{attention}"] = folder = work / f"{cache}-{attention}"
            command = ["build", "onnxruntime", str(work / cache), "--out", str(folder), "--attention", attention]
            if not folder.exists():
                tool("recipes.cli", *command, "--quiet")
    return folders


def opened(loop: str, folder: Path) -> Callable[[int], tuple[Append, Callable[[], object]]]:
    """A function that begins a sequence of at most so many tokens: what appends a piece to it, and what a step is."""
    if loop == GENERATE:
        engine = OnnxRuntimeEngine(folder)

        def ours(_: int) -> tuple[Append, Callable[[], object]]:
            decoding = engine.empty()
            return decoding.append, lambda: decoding.step(5)

        return ours
    model = onnxruntime_genai.Model(str(folder))

    def theirs(longest: int) -> tuple[Append, Callable[[], object]]:
        parameters = onnxruntime_genai.GeneratorParams(model)
        parameters.set_search_options(max_length=longest, min_length=longest, do_sample=False)
        generator = onnxruntime_genai.Generator(model, parameters)
        return lambda ids: generator.append_tokens(numpy.array(ids, numpy.int32)), generator.generate_next_token

    return theirs


def prompt(tokens: int) -> list[int]:
    return numpy.random.default_rng(0).integers(1000, 40000, tokens).tolist()


def speeds(folders: dict[str, Path], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of a step behind the prompt, and of processors, by loop and engine, one of each round."""
    steps = {}
    for name, folder in folders.items():
        for loop in (GENERATE, GENAI):
            append, step = opened(loop, folder)(TOKENS + STEPS * (rounds + 1))
            for piece in pieces(prompt(TOKENS)):
                append(piece)
            step()  # onnxruntime-genai's first takes a token of the logits that it has
            steps[f"{loop}, {name}"] = step
    found: dict[str, dict[str, list[float]]] = {what: {SECONDS: [], PROCESSORS: []} for what in steps}
    for _ in range(rounds):
        for what, step in steps.items():
            begin, busy = time.perf_counter(), time.process_time()
            for _ in range(STEPS):
                step()
            found[what][PROCESSORS].append((time.process_time() - busy) / STEPS)
            found[what][SECONDS].append((time.perf_counter() - begin) / STEPS)
    torch.set_flush_denormal(False)  # onnxruntime-genai sets it for the thread, and leaves it so
    return found


def alone(loop: str, folder: Path) -> None:
    """Print how many bytes the resident memory grew by, at its end and at most, and the seconds of the prompt."""
    start = opened(loop, folder)
    append, _ = start(PIECE + 1)
    append(prompt(PIECE))
    del append
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before, _ = resident()
    append, _ = start(TOKENS + STEPS)
    begin = time.perf_counter()
    for piece in pieces(prompt(TOKENS)):
        append(piece)
    seconds = time.perf_counter() - begin
    after, peak = resident()
    print(json.dumps({"after": after - before, "peak": peak - before, "prompt_seconds": seconds}))


def resident() -> tuple[int, int]:
    """The bytes of this process's resident memory, and the most since its peak began."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    now, peak = (re.search(rf"{name}:\s+(\d+) kB", status) for name in ("VmRSS", "VmHWM"))
    assert now is not None
    assert peak is not None
    return int(now[1]) * 1024, int(peak[1]) * 1024


def accuracies(folders: dict[str, Path], arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """What `validate` finds, by engine."""
    report = arguments.work / "report.json"
    given = ["--reference", arguments.model, "--plan", arguments.plan, "--plan", arguments.int8_plan]
    given += ["--text", arguments.text, "--samples", arguments.samples, "--length", arguments.length, "--out", report]
    command = ["validate", *folders.values(), *given, "--no-thresholds", "--quiet"]
    tool("recipes.cli", *map(str, command))
    return {one["label"]: one["metrics"] for one in read_json(report)["validations"]}


def cache_bytes(folders: dict[str, Path], cache: str) -> int:
    return OnnxRuntimeEngine(folders[f"{cache}-{STANDARD}"]).cache_bytes(1, TOKENS)


def rows(model: str, speed: dict[str, dict], memory: dict[str, dict], sizes: list[int]) -> list[Row]:
    whole, small = (f"{size / 1e6:.1f}" for size in sizes)
    found = [Row(f"{model}: keys and values of {TOKENS:,} tokens", f"{small} MB in INT8, {whole} MB in float32")]
    for attention in ATTENTION:
        for loop in (GENERATE, GENAI):
            float_one, int8_one = (f"{loop}, {cache}-{attention}" for cache in (FLOAT, INT8))
            ratios = {
                what: [
                    wide / narrow for wide, narrow in zip(speed[float_one][what], speed[int8_one][what], strict=True)
                ]
                for what in (SECONDS, PROCESSORS)
            }
            low, middle, high = quantiles(ratios[SECONDS], n=4)
            rate, float_rate = (1 / median(speed[what][SECONDS]) for what in (int8_one, float_one))
            told = f"{middle:.2f} ({low:.2f} to {high:.2f}) x the speed: {rate:.1f} against {float_rate:.1f} a second"
            peak, float_peak = (memory[what]["peak"] / 1e6 for what in (int8_one, float_one))
            told += f", processors {median(ratios[PROCESSORS]):.2f} x"
            wait, float_wait = (memory[what]["prompt_seconds"] for what in (int8_one, float_one))
            told += f"; the prompt: peak {peak:.0f} against {float_peak:.0f} MB, {wait:.0f} against {float_wait:.0f} s"
            found.append(
                Row(
                    f"{model}: tokens behind {TOKENS:,}, INT8 cache to float cache, {attention}, {loop}",
                    told,
                )
            )
    return found


def accuracy_rows(model: str, metrics: dict[str, dict[str, float]]) -> list[Row]:
    found = []
    for attention in ATTENTION:
        parts = [
            f"KL {one['kl_mean']:.4f}, top-1 {one['top1']:.1%}"
            for one in (metrics[f"{cache}-{attention}"] for cache in (INT8, FLOAT))
        ]
        found.append(Row(f"{model}: validate with an INT8 cache, {attention}", f"{parts[0]}; float: {parts[1]}"))
    return found


if __name__ == "__main__":
    main()
