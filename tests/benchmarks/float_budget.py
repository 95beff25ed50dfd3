"""Bytes in float against accuracy: a static W8A8 model with the linears in float that a budget buys.

    python -m tests.benchmarks.float_budget MODEL ACT_SCALES TEXT     # real weights; TEXT: held out

MODEL is no part of the repository: its name, its fingerprint and that of the text are in the results.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from act_scales.text import load_text
from builders.validate import validate_engines
from exporters.export import export
from recipes import pipeline
from recipes.families import open_model
from smoothquant.settings import SmoothingSettings
from smoothquant.static import numbers_of
from tests.benchmarks.results import Row, publish
from tests.writers import onnx_writer

ALPHA = 0.85
CHOICES = ("none", "2.5%", "5%", "10%", "25%", "auto")
SAMPLES, LENGTH = 8, 512


def main(folder: str, act_scales: str, heldout: str) -> None:
    model = open_model(folder)
    text = load_text(heldout, folder, SAMPLES, LENGTH).for_model(model)
    source = pipeline.source_of(model, act_scales, SmoothingSettings(ALPHA))
    kept = {choice: source.kept(choice) for choice in CHOICES}
    with tempfile.TemporaryDirectory() as scratch:
        folders = {choice: Path(scratch) / str(number) for number, choice in enumerate(CHOICES)}
        export(source, [onnx_writer(folders[choice], "per-tensor", kept=names) for choice, names in kept.items()])
        found = validate_engines(folders, model, text)
    rows, details = [], {}
    for validation in found:
        names, metrics = kept[validation.label], validation.metrics
        share = numbers_of(model, names) / numbers_of(model)
        details[validation.label] = {
            "share": share,
            "kl_mean": metrics.kl_mean,
            "perplexity_ratio": metrics.perplexity_ratio,
            "top1": metrics.top1,
            "float_linears": names,
        }
        told = f"{share:.1%} in float, KL {metrics.kl_mean:.4f}, perplexity {metrics.perplexity_ratio - 1:+.2%}"
        rows.append(Row(f"--keep-float {validation.label}", f"{told}, top-1 {metrics.top1:.1%}"))
    made_from = {"model": model.checkpoint.fingerprint, "text": text.fingerprint, "tokens": text.tokens}
    publish("float_budget", rows, {"name": Path(folder).name, "alpha": ALPHA, **made_from, "choices": details})


if __name__ == "__main__":
    main(*sys.argv[1:])
