"""What `generate` costs beside its engine: tokens per second against a bare loop on the same session, and its start.

    python -m tests.benchmarks.generate_speed [--tokens 256 --rounds 15]

Engine: the bundled model in W8A8, so small that nothing hides what Python does for a token. The loop is the shortest
that continues a prompt: I/O binding, the cache stays in the runtime, the likeliest token. Both take turns, and ratios
are of times next to each other. A start is a process of its own, from its beginning to its end, for one token; the
first one, which reads files into memory, does not count.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

import numpy
import onnxruntime

from act_scales.kept_tokenizer import engine_encoder
from builders.onnxruntime import OnnxRuntimeEngine, build
from builders.onnxruntime.session import first_feed
from exporters.export import Source, export
from recipes import tiny_llama
from recipes.families import open_model
from smoothquant.artifacts.ports import ATTENTION_MASK, INPUT_IDS, LOGITS, LOGITS_TO_KEEP, PAST, POSITION_IDS, PRESENT
from smoothquant.machine import subnormals_as_zero
from smoothquant.settings import SmoothingSettings
from tests.benchmarks.results import Row, publish
from tests.writers import onnx_writer

PROMPT = "def main():"
STARTS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "engine"
        export(
            Source(open_model(tiny_llama.PATH), SmoothingSettings(groups="none")),
            [onnx_writer(Path(scratch) / "onnx")],
        )
        build(Path(scratch) / "onnx", folder)
        seconds = compare(folder, arguments.tokens, arguments.rounds)
        starts = [start(folder) for _ in range(STARTS + 1)][1:]
    rows = []
    for what, label in (("generate, the tokens", "tokens"), ("generate, the text as it comes", "text")):
        found = [bare / ours for bare, ours in zip(seconds["bare"], seconds[label], strict=True)]
        rate = arguments.tokens / median(seconds[label])
        text = f"{median(found):.1%} of a bare session loop ({min(found):.1%} to {max(found):.1%}), {rate:.0f} a second"
        rows.append(Row(f"{what}, bundled model", text, ">= 95 %"))
    text = f"{median(starts):.2f} s ({min(starts):.2f} to {max(starts):.2f})"
    rows.append(Row("generate, one token from a new process, bundled model", text, "<= 1.5 s"))
    publish("generate_speed", rows, {"seconds": seconds, "starts": starts})


def compare(folder: Path, tokens: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of so many tokens, one of each per round: of the loop, of the tokens of `generate`, and of their text."""
    engine = OnnxRuntimeEngine(folder)
    encoder = engine_encoder(folder, engine.manifest)
    [prompt, _] = encoder.whole([PROMPT])
    ways: dict[str, Callable[[], object]] = {
        "bare": lambda: bare(engine.session, prompt, tokens),
        "tokens": lambda: list(engine.generate(prompt, tokens)),
        "text": lambda: list(encoder.streamed(engine.generate(prompt, tokens))),
    }
    expected = bare(engine.session, prompt, tokens)
    found = list(engine.generate(prompt, tokens))
    assert found == expected, "another text, or one that ends early"
    seconds: dict[str, list[float]] = {label: [] for label in ways}
    for _ in range(rounds):
        for label, way in ways.items():
            began = time.perf_counter()
            way()
            seconds[label].append(time.perf_counter() - began)
    return seconds


def bare(session: onnxruntime.InferenceSession, prompt: Sequence[int], tokens: int) -> list[int]:
    """The likeliest tokens behind a prompt."""
    ids = numpy.array([prompt], dtype=numpy.int64)
    feed = first_feed(session, ids)
    places, count, found = feed[POSITION_IDS], 0, []
    outputs = [value.name for value in session.get_outputs()]
    wrap = onnxruntime.OrtValue.ortvalue_from_numpy
    cache = {name: wrap(array) for name, array in feed.items() if name.startswith(PAST)}
    keep = wrap(numpy.ones(1, dtype=numpy.int64))
    binding = session.io_binding()
    binding.bind_ortvalue_input(LOGITS_TO_KEEP, keep)
    with subnormals_as_zero():
        while len(found) < tokens:
            count += ids.shape[1]
            binding.bind_cpu_input(INPUT_IDS, ids)
            binding.bind_cpu_input(POSITION_IDS, places)
            binding.bind_cpu_input(ATTENTION_MASK, numpy.ones((1, count), dtype=numpy.int64))
            for name, value in cache.items():
                binding.bind_ortvalue_input(name, value)
            for name in outputs:
                binding.bind_output(name)
            session.run_with_iobinding(binding)
            values = dict(zip(outputs, binding.get_outputs(), strict=True))
            token = int(values.pop(LOGITS).numpy()[0, -1].argmax())
            cache = {name.replace(PRESENT, PAST): value for name, value in values.items()}
            found.append(token)
            ids, places = numpy.array([[token]], dtype=numpy.int64), numpy.array([[count]], dtype=numpy.int64)
    return found


def start(folder: Path) -> float:
    """Seconds of a process that generates one token."""
    command = [sys.executable, "-m", "recipes.cli", "generate", str(folder), PROMPT, "--max-new-tokens", "1", "--quiet"]
    began = time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
