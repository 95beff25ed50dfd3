"""A step of many sequences in each engine that could compute a server's batches.

    python -m tests.benchmarks.batching EXPORT [--rounds 7]

EXPORT: made by `export onnx`. All sequences have one length, which is the best case of onnxruntime-genai and OpenVINO:
both compute a batch as a rectangle, padded to the longest. The server's own form and onnxruntime-genai have the same
grouped graph, OpenVINO has the exported one, and the last form computes one sequence after another.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy
import onnxruntime_genai
import torch

from builders.onnxruntime import OnnxRuntimeEngine, build
from builders.onnxruntime.record import ATTENTION, GROUPED
from builders.openvino import build as build_openvino
from builders.openvino.engine import OpenVinoRequest
from builders.openvino.graph import compile_graph
from smoothquant.files import scratch
from tests.benchmarks.results import Row, publish

CELLS = [(batch, cached) for cached in (256, 1024) for batch in (1, 4, 16)]
STEPS, LONGEST = 8, 1280
OURS, GENAI, OPENVINO, SEPARATE = "grouped", "onnxruntime-genai", "OpenVINO", "one after another"
Step = Callable[[], object]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("export", type=Path)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    with scratch() as place:
        folders = {attention: place / attention for attention in ATTENTION}
        for attention, folder in folders.items():
            build(arguments.export, folder, attention=attention)
        build_openvino(arguments.export, place / "openvino")
        seconds = measured(folders, place / "openvino", arguments.rounds)
    publish("batching", list(rows(seconds)))


def measured(folders: dict[str, Path], openvino: Path, rounds: int) -> dict[tuple[int, int], dict[str, list[float]]]:
    """Seconds of a step by cell and form, one of each round."""
    engines = {attention: OnnxRuntimeEngine(folder) for attention, folder in folders.items()}
    theirs, compiled = onnxruntime_genai.Model(str(folders[GROUPED])), compile_graph(openvino)
    vocabulary = engines[GROUPED].manifest.facts.vocab_size
    found: dict[tuple[int, int], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for batch, cached in CELLS:
        ids = numpy.random.default_rng(cached).integers(0, vocabulary, (batch, cached))
        steps: dict[str, Step] = {
            OURS: _slots(engines[GROUPED], ids),
            GENAI: _genai(theirs, ids),
            OPENVINO: _openvino(compiled, ids),
            SEPARATE: _slots(engines[next(form for form in ATTENTION if form != GROUPED)], ids),
        }
        for _ in range(rounds):
            for form, step in steps.items():
                begin = time.perf_counter()
                for _ in range(STEPS):
                    step()
                found[batch, cached][form].append((time.perf_counter() - begin) / STEPS)
        torch.set_flush_denormal(False)  # onnxruntime-genai sets it for the thread, and leaves it so
    return found


def _slots(engine: OnnxRuntimeEngine, ids: numpy.ndarray) -> Step:
    slots = engine.slots(len(ids), LONGEST)
    taken = [slots.open() for _ in ids]
    for slot, tokens in zip(taken, ids.tolist(), strict=True):
        for begin in range(0, len(tokens), 256):
            slots.append(slot, tokens[begin : begin + 256])
    return lambda: slots.step(dict.fromkeys(taken, 5))


def _genai(model: onnxruntime_genai.Model, ids: numpy.ndarray) -> Step:
    parameters = onnxruntime_genai.GeneratorParams(model)
    parameters.set_search_options(max_length=LONGEST, min_length=LONGEST, do_sample=False, batch_size=len(ids))
    generator = onnxruntime_genai.Generator(model, parameters)
    generator.append_tokens(ids.astype(numpy.int32))
    return generator.generate_next_token


def _openvino(graph: object, ids: numpy.ndarray) -> Step:
    request = OpenVinoRequest(graph, batch=len(ids))  # type: ignore[arg-type]
    request.run(ids, keep=1)
    return lambda: request.run(numpy.full((len(ids), 1), 5), keep=1)


def rows(seconds: dict[tuple[int, int], dict[str, list[float]]]) -> list[Row]:
    found = []
    for (batch, cached), forms in seconds.items():
        ours = forms[OURS]
        parts = [
            f"{form} {median(own / other for own, other in zip(ours, times, strict=True)):.2f}"
            for form, times in forms.items()
            if form != OURS
        ]
        speed = batch / median(ours)
        what = f"steps of {batch} sequence{'s' * (batch > 1)} behind {cached} tokens, grouped"
        found.append(Row(what, f"{speed:.0f} tokens per second; of that: {', '.join(parts)}"))
    return found


if __name__ == "__main__":
    main()
