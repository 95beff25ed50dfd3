"""The forms of an ONNX export side by side, in ONNX Runtime.

accuracy   on held-out text: of the bundled model; and of the same function with a spike before two down_proj, one
           channel 256 times as large, which `--groups paper` cannot fold: what one static scale makes of that, and what
           it costs to leave those linears in float
speed      of two random decoder layers, hidden 2048: what the form of the cache and the operator set make of it
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from act_scales.collect import collect
from act_scales.text import load_text
from builders.engine.speed import measure
from builders.onnxruntime import OnnxRuntimeEngine
from builders.validate import Validation, validate_engines
from exporters.export import Source, export
from exporters.onnx import OnnxWriter
from recipes import pipeline, tiny_llama
from recipes.families import open_model
from recipes.models import RECIPES
from recipes.recipe import find
from recipes.synthetic import save_random_llama
from smoothquant.settings import SmoothingSettings
from tests.benchmarks.results import Row, publish
from tests.writers import onnx_writer

RECIPE = find("tiny-llama", RECIPES)
HELDOUT = 32  # sequences
SPIKE, SPIKED, CHANNEL = 256.0, (1, 2), 7  # factor, layers, channel
TOKEN, TENSOR = {"activations": "per-token"}, {"activations": "per-tensor"}
DEFAULT: dict[str, dict] = {
    "float, FP32 body": {"activations": "float"},
    "float, INT8 KV cache": {"activations": "float", "kv": "int8"},
    "per token": TOKEN,
    "per token, FP16 body": TOKEN | {"body": "fp16"},
    "per token, INT8 head": TOKEN | {"lm_head": "int8"},
    "per token, INT8 KV cache": TOKEN | {"kv": "int8"},
    "per token, INT8 head and KV cache": TOKEN | {"lm_head": "int8", "kv": "int8"},
    "per tensor": TENSOR,
    "per tensor, FP16 body": TENSOR | {"body": "fp16"},
    "per tensor, down_proj in float": TENSOR | {"keep": "down"},
    "per tensor, INT8 KV cache": TENSOR | {"kv": "int8"},
}
PAPER: dict[str, dict] = {
    "per token": TOKEN,
    "per tensor": TENSOR | {"keep": "none"},
    "per tensor, --keep-float auto": TENSOR | {"keep": "auto"},
    "per tensor, down_proj in float": TENSOR | {"keep": "down"},
}
COLUMNS = ("perplexity", "to FP16", "KL to FP16", "top-1", "MB")
SPEEDS: dict[str, dict] = {
    "per token": TOKEN,
    "per token, INT8 KV cache": TOKEN | {"kv": "int8"},
    "per token, opset 17": TOKEN | {"opset": 17},
    "per token, opset 23": TOKEN | {"opset": 23},
}
PROMPT = 1024


def main() -> None:
    rows: list[Row] = []
    details: dict = {"columns": list(COLUMNS), "tables": {}}
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        spiking = save_spiking(root / "spiking")
        for title, folder, groups, forms in (
            ("the bundled model", tiny_llama.PATH, "default", DEFAULT),
            ("the bundled model, --groups paper", tiny_llama.PATH, "paper", PAPER),
            (f"with spikes before {len(SPIKED)} down_proj, --groups paper", spiking, "paper", PAPER),
        ):
            found = validated(root / title.replace(" ", "-"), folder, groups, forms)
            details["tables"][title] = {validation.label: facts(validation) for validation in found}
            rows += [Row(f"{title}: {v.label}", ", ".join(cells(v))) for v in found]
        details["speed"] = speeds(root)
    for label, found in details["speed"].items():
        rows.append(Row(f"two layers of hidden size 2048, {PROMPT} tokens: {label}", timed(found)))
    publish("onnx_forms", rows, details)


def save_spiking(folder: Path) -> Path:
    """The bundled model with a large channel before some down_proj, at no change of the function."""
    shutil.copytree(tiny_llama.PATH, folder, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    weights = load_file(folder / "model.safetensors")
    for layer in SPIKED:
        weights[f"model.layers.{layer}.mlp.up_proj.weight"][CHANNEL] *= SPIKE
        weights[f"model.layers.{layer}.mlp.down_proj.weight"][:, CHANNEL] /= SPIKE
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def validated(out: Path, folder: Path, groups: str, forms: Mapping[str, dict]) -> list[Validation]:
    model = open_model(folder)
    text = load_text(tiny_llama.CALIBRATION_TEXT, folder, RECIPE.samples, RECIPE.length)
    heldout = load_text(tiny_llama.EVALUATION_TEXT, folder, HELDOUT, RECIPE.length)
    out.mkdir()
    collect(model, text, out / "act_scales.safetensors")
    settings = replace(RECIPE.settings(model, groups=groups), cache="own")  # for the forms that have one in INT8
    source = pipeline.source_of(model, out / "act_scales.safetensors", settings)
    folders = {label: out / str(number) for number, label in enumerate(forms)}
    export(source, list(writers(source, folders, forms)))
    return validate_engines(folders, model, heldout)


def writers(source: Source, folders: Mapping[str, Path], forms: Mapping[str, dict]) -> Iterator[OnnxWriter]:
    for label, options in forms.items():
        chosen = dict(options)
        kept = source.kept(chosen.pop("keep", "none"))
        yield onnx_writer(folders[label], kept=kept, **chosen)


def speeds(root: Path) -> dict[str, dict[str, float]]:
    save_random_llama(root / "model", layers=2, vocabulary=1024)
    model = open_model(root / "model")
    outputs = {name: torch.ones(shape[0]) for name, shape in model.linears()}
    source = Source(model, SmoothingSettings(groups="none"), output_absmax=outputs)
    folders = {label: root / f"speed-{number}" for number, label in enumerate(SPEEDS)}
    export(source, [onnx_writer(folders[label], **options) for label, options in SPEEDS.items()])
    engines = {label: OnnxRuntimeEngine(folder) for label, folder in folders.items()}
    return {label: asdict(found) for label, found in measure(engines, prompt=PROMPT, steps=12, rounds=11).items()}


def timed(found: Mapping[str, float]) -> str:
    return f"prefill {found['prefill'] * 1e3:.0f} ms, decode {found['decode'] * 1e3:.1f} ms"


def facts(validation: Validation) -> dict:
    metrics, subject = validation.metrics, validation.subject
    return {
        "cells": cells(validation),
        "perplexity": metrics.perplexity,
        "perplexity_ratio": metrics.perplexity_ratio,
        "kl_mean": metrics.kl_mean,
        "kl_p99": metrics.kl_p99,
        "top1": metrics.top1,
        "bytes": subject["bytes"],
        "float_linears": subject["inputs"].get("float_linears", []),
    }


def cells(validation: Validation) -> list[str]:
    """By `COLUMNS`."""
    metrics = validation.metrics
    return [
        f"{metrics.perplexity:.2f}",
        f"{metrics.perplexity_ratio - 1:+.2%}",
        f"{metrics.kl_mean:.5f}",
        f"{metrics.top1:.1%}",
        f"{validation.subject['bytes'] / 1e6:.1f}",
    ]


def table(details: Mapping) -> str:
    """Markdown, a line per form."""
    head = ["", *details["columns"]]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for title, forms in details["tables"].items():
        lines.append(f"| **{title}** |" + " |" * len(details["columns"]))
        for label, found in forms.items():
            kept = len(found["float_linears"])
            shown = f"{label} ({kept} of them)" if kept and "auto" in label else label
            lines.append(f"| {shown} | {' | '.join(found['cells'])} |")
    lines += ["", f"| two layers of hidden size 2048 | {PROMPT} tokens, and one behind them |", "|---|---|"]
    lines += [f"| {label} | {timed(found)} |" for label, found in details["speed"].items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
