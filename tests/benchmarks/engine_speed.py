"""INT8 against FP32 in ONNX Runtime, on a random Llama: prefill of a prompt, and one token behind it. INT8 in OpenVINO
beside them.

    python -m tests.benchmarks.engine_speed [--hidden 2048 --layers 4 --vocab 32000 --prefill 256 --repeats 7]

The model is made on the spot and exported three times: the float twin, W8A8 with the float output head, W8A8 with the
INT8 one. Each computes the logits of the last token alone. All engines are open at once and take turns; what counts are
ratios of times next to each other, their median over the repeats. Target: 2.4 x the FP32 engine, for both.

Bound: the ratio if everything but matrix products took no time. A profile of the same process says what share of its
time an engine spends in them; bound = ratio / share.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy

from builders import openvino
from builders.engine.generation import GeneratingEngine
from builders.engine.speed import measure
from builders.onnxruntime import OnnxRuntimeEngine
from builders.onnxruntime.session import PAST, first_feed, open_session
from exporters.export import Source, export
from recipes.families import open_model
from smoothquant.artifacts.ports import LOGITS_TO_KEEP
from smoothquant.machine import subnormals_as_zero
from smoothquant.settings import SmoothingSettings
from tests.benchmarks.random_llama import save_llama
from tests.benchmarks.results import Row, publish
from tests.writers import onnx_writer

TARGET = 2.4
BASE = "FP32"
VARIANTS = {  # how a graph computes does not depend on smoothing: no act scales are needed
    BASE: {"activations": "float"},
    "W8A8, float head": {"activations": "per-token"},
    "W8A8, INT8 head": {"activations": "per-token", "lm_head": "int8"},
}
OPENVINO = {label: f"{label}, in OpenVINO" for label in VARIANTS if label != BASE}
PHASES = ("prefill", "decode")
PRODUCTS = ("MatMul", "FusedMatMul", "MatMulIntegerToFloat")  # as ONNX Runtime names them after fusion


@dataclass(frozen=True)
class Profile:
    """Seconds in the matrix products, in the output head alone, and in all operators; of each the fastest of 6 runs."""

    products: float
    head: float
    all: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--prefill", type=int, default=256, help="tokens of the prompt")
    parser.add_argument("--repeats", type=int, default=7)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folders = export_all(Path(scratch), arguments.hidden, arguments.layers, arguments.vocab)
        ratios, seconds = compare(folders, arguments.prefill, arguments.repeats)
        profiles = {label: profile(folder, arguments.prefill) for label, folder in folders.items()}
    rows, details = [], {}
    for label in VARIANTS:
        for phase in PHASES:
            took, spent = median(seconds[label, phase]), profiles[label][phase]
            details[f"{label}, {phase}"] = {"seconds": seconds[label, phase], "profile": vars(spent)}
            if label == BASE:
                rows.append(Row(f"{phase}, {label}", f"{took * 1e3:.1f} ms"))
                continue
            found = ratios[label, phase]
            details[f"{label}, {phase}"]["ratios"] = found
            share = spent.products / spent.all
            text = (
                f"{median(found):.2f} x FP32 ({min(found):.2f} to {max(found):.2f}), {took * 1e3:.1f} ms, "
                f"{share:.0%} of the bound {median(found) / share:.2f}; head {spent.head / spent.all:.0%} of the time"
            )
            rows.append(Row(f"{phase}, {label}", text, f">= {TARGET}"))
    for label in OPENVINO.values():
        for phase in PHASES:
            found, took = ratios[label, phase], median(seconds[label, phase])
            details[f"{label}, {phase}"] = {"seconds": seconds[label, phase], "ratios": found}
            text = f"{median(found):.2f} x FP32 ({min(found):.2f} to {max(found):.2f}), {took * 1e3:.1f} ms"
            rows.append(Row(f"{phase}, {label}", text))
    publish("engine_speed", rows, details)


def export_all(scratch: Path, hidden: int, layers: int, vocabulary: int) -> dict[str, Path]:
    """The model, and its exports by label."""
    save_llama(scratch / "model", hidden, layers, vocabulary)
    source = Source(open_model(scratch / "model"), SmoothingSettings(groups="none"))
    folders = {label: scratch / f"export-{number}" for number, label in enumerate(VARIANTS)}
    export(source, [onnx_writer(folders[label], **options) for label, options in VARIANTS.items()])
    return folders


def compare(
    folders: Mapping[str, Path], prompt: int, repeats: int
) -> tuple[dict[tuple[str, str], list[float]], dict[tuple[str, str], list[float]]]:
    """(ratios to the FP32 engine, seconds), one of each per repeat, by (label, phase)."""
    engines: dict[str, GeneratingEngine] = {label: OnnxRuntimeEngine(folder) for label, folder in folders.items()}
    for label, name in OPENVINO.items():
        built = folders[label].with_name(f"{folders[label].name}-openvino")
        openvino.build(folders[label], built)
        engines[name] = openvino.OpenVinoEngine(built)
    ratios, seconds = defaultdict(list), defaultdict(list)
    for _ in range(repeats):
        speeds = measure(engines, prompt=prompt, steps=16, rounds=3)
        for label, speed in speeds.items():
            for phase in PHASES:
                seconds[label, phase].append(getattr(speed, phase))
                ratios[label, phase].append(getattr(speeds[BASE], phase) / getattr(speed, phase))
    return ratios, seconds


def profile(folder: Path, prompt: int) -> dict[str, Profile]:
    """Where the time goes, by phase."""
    return {phase: _profile(folder, prompt, phase) for phase in PHASES}


def _profile(folder: Path, prompt: int, phase: str, runs: int = 6) -> Profile:
    with tempfile.TemporaryDirectory() as scratch:
        session = open_session(folder, profile=Path(scratch) / "profile")
        feed = first_feed(session, numpy.ones((1, prompt), dtype=numpy.int64))
        feed[LOGITS_TO_KEEP] = numpy.ones(1, dtype=numpy.int64)  # as generate does
        if phase == "decode":
            feed = _behind(feed, prompt)
        with subnormals_as_zero():
            for _ in range(runs):
                session.run(["logits"], feed)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    fastest: dict[tuple[str, str], float] = {}  # (operator, node) -> seconds
    for event in events:
        if event["name"].endswith("_kernel_time"):
            key = event["args"]["op_name"], event["name"]
            fastest[key] = min(event["dur"] / 1e6, fastest.get(key, float("inf")))
    products = {key: spent for key, spent in fastest.items() if key[0] in PRODUCTS}
    head = sum(spent for (_, node), spent in products.items() if node.startswith("lm_head"))
    return Profile(sum(products.values()), head, sum(fastest.values()))


def _behind(feed: Mapping[str, numpy.ndarray], past: int) -> dict[str, numpy.ndarray]:
    """One token behind a cache of `past` tokens, from a feed with an empty cache."""
    cache = {name: array for name, array in feed.items() if name.startswith(PAST)}
    return {
        "input_ids": numpy.ones((1, 1), dtype=numpy.int64),
        "position_ids": numpy.full((1, 1), past, dtype=numpy.int64),
        "attention_mask": numpy.ones((1, past + 1), dtype=numpy.int64),
        **{name: numpy.zeros((1, a.shape[1], past, a.shape[3]), dtype=a.dtype) for name, a in cache.items()},
    }


if __name__ == "__main__":
    main()
