"""A step of many sequences in each engine that could compute a server's batches.

    python -m tests.benchmarks.batching EXPORT [--rounds 7]

EXPORT: made by `export onnx`. All sequences have one length, which is the best case of onnxruntime-genai and OpenVINO:
both compute a batch as a rectangle, padded to the longest. The server's own form and onnxruntime-genai have the same
grouped graph, OpenVINO has the exported one, and the last form computes one sequence after another.

onnxruntime-genai's Engine, whose requests join and leave as the server's do, gets whole requests: prompts of 256 random
tokens and 64 new ones. It takes as many at once as it says; the bare loop takes all.
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

from builders.engine.generation import pieces
from builders.onnxruntime import OnnxRuntimeEngine, build
from builders.onnxruntime.record import ATTENTION, GROUPED
from builders.openvino import build as build_openvino
from builders.openvino.engine import OpenVinoRequest
from builders.openvino.graph import compile_graph
from smoothquant.files import scratch
from tests.benchmarks.results import Row, publish
from tests.benchmarks.serve_speed import NEW, loop_speed

CELLS = [(1, 256), (4, 256), (16, 256), (4, 1024)]  # onnxruntime-genai computes the logits of all tokens of a prompt
STEPS, LONGEST = 8, 1280
PROMPT = 256  # tokens
TOKEN = onnxruntime_genai.EngineEventFlags.TOKEN
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
        found = list(rows(measured(folders, place / "openvino", arguments.rounds)))
        found += engine_rows(folders[GROUPED], arguments.rounds)
    publish("batching", found)


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
        for piece in pieces(tokens):
            slots.append(slot, piece)
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


def engine_rows(folder: Path, rounds: int) -> list[Row]:
    ours, theirs = OnnxRuntimeEngine(folder), onnxruntime_genai.Engine(onnxruntime_genai.Model(str(folder)))
    most = theirs.get_capabilities().configured_max_batch_size
    found = []
    for count in (1, 4, 16):
        pairs = [(_loop_speed(ours, count), _engine_speed(theirs, count)) for _ in range(rounds)]
        torch.set_flush_denormal(False)
        speeds = [median(column) for column in zip(*pairs, strict=True)]
        ratio = median(their / our for our, their in pairs)
        found.append(
            Row(
                f"{count} request{'s' * (count > 1)} of {PROMPT} and {NEW} tokens, grouped",
                f"{speeds[0]:.0f} tokens per second; of that: onnxruntime-genai's Engine {ratio:.2f}, {most} at once",
            )
        )
    return found


def _loop_speed(engine: OnnxRuntimeEngine, count: int) -> float:
    return loop_speed(engine, count, PROMPT)["output_throughput"]


def _engine_speed(engine: onnxruntime_genai.Engine, count: int) -> float:
    """New tokens per second of so many requests that come together."""
    random, requests = numpy.random.default_rng(), []
    begin = time.perf_counter()
    for _ in range(max(2, count)):
        request = engine.create_request()
        options = onnxruntime_genai.TurnOptions(request)
        options.set_do_sample(False)
        options.set_min_generated_tokens(NEW)
        options.set_max_generated_tokens(NEW)
        request.begin_turn(random.integers(0, 40000, PROMPT).astype(numpy.int32), options)
        requests.append(request)
    events, tokens = engine.create_event_buffer(64), 0
    while engine.has_pending_requests():
        tokens += sum(bool(int(event.flags) & int(TOKEN)) for event in engine.run(events))
    assert tokens == NEW * len(requests)
    seconds = time.perf_counter() - begin
    for request in requests:
        request.close()
    return tokens / seconds


if __name__ == "__main__":
    main()
