"""The demonstration: the bundled model through the whole pipeline, naively and with SmoothQuant, side by side.

    OUT/act_scales.safetensors, OUT/w8a8/, OUT/onnx/FORM/, OUT/engine/FORM/, OUT/validation.json, OUT/report.html

FORM: float (the FP32 ONNX engine, to compare speed with), and W8A8 naive and smoothquant, each with static per-tensor
and dynamic per-token activations.
"""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from act_scales.collect import collect
from act_scales.text import load_text
from builders import onnxruntime
from builders.engine import speed
from builders.validate import Thresholds, Validation
from builders.validate.report import write_report
from exporters.export import Source, Writer, export
from exporters.huggingface import W8A8Writer
from exporters.onnx import OnnxWriter
from recipes import pipeline, tiny_llama
from recipes.families import open_model
from recipes.models import RECIPES
from recipes.recipe import find
from recipes.synthetic import save_random_llama
from smoothquant.checkpoint import Checkpoint
from smoothquant.model import Model
from smoothquant.settings import SmoothingSettings

FLOAT = "FP32 ONNX"
FORMS = {  # label -> (folder, smoothing groups, activations)
    "naive, per tensor": ("naive-per-tensor", "none", "per-tensor"),
    "naive, per token": ("naive-per-token", "none", "per-token"),
    "SmoothQuant, per tensor": ("smoothquant-per-tensor", "default", "per-tensor"),
    "SmoothQuant, per token": ("smoothquant-per-token", "default", "per-token"),
}
BEST = "SmoothQuant, per token"
HELDOUT = 32  # sequences
RECIPE = "tiny-llama"
LAYERS = 2  # decoder layers of the size of a real model, for speed
LIMITS = Thresholds(kl_mean=0.005, top1=0.95, perplexity_ratio=1.005)  # back to within 0.5 %


@dataclass(frozen=True)
class Demonstration:
    """What the demonstration found. speeds: by label, of the bundled model; real: of layers of a real model's size."""

    validations: list[Validation]
    speeds: dict[str, speed.Speed]
    real: dict[str, speed.Speed]
    engine: Path
    report: Path

    def speeds_as_dict(self) -> dict:
        return {
            name: {label: asdict(found) for label, found in speeds.items()}
            for name, speeds in (("bundled", self.speeds), ("hidden 2048", self.real))
        }


def demonstrate(out: Path, step: pipeline.Step, *, overwrite: bool = False) -> Demonstration:
    """Run everything; finished steps are not done again, except the measuring of speed."""
    recipe, model = find(RECIPE, RECIPES), open_model(tiny_llama.PATH)
    text = load_text(tiny_llama.CALIBRATION_TEXT, tiny_llama.PATH, recipe.samples, recipe.length)
    heldout = load_text(tiny_llama.EVALUATION_TEXT, tiny_llama.PATH, HELDOUT, recipe.length)
    with step("calibrate") as progress:
        scales = out / "act_scales.safetensors"
        collect(model, text, scales, overwrite=overwrite, progress=progress)
    with step("smooth, quantize, export") as progress:
        naive = pipeline.source_of(model, scales, SmoothingSettings(groups="none"))
        smooth = pipeline.source_of(model, scales, recipe.settings())
        plain = pipeline.source_of(model, None, SmoothingSettings(groups="none"))
        export(plain, [OnnxWriter(out / "onnx/float", "float")], overwrite=overwrite, progress=progress)
        export(naive, _writers(out, "none"), overwrite=overwrite, progress=progress)
        writers = [*_writers(out, "default"), W8A8Writer(out / "w8a8")]
        export(smooth, writers, overwrite=overwrite, progress=progress)
    folders = ["float", *(folder for folder, _, _ in FORMS.values())]
    with step("build engines") as progress:
        for count, folder in enumerate(folders):
            onnxruntime.build(out / "onnx" / folder, out / "engine" / folder, overwrite=overwrite)
            progress(count + 1, len(folders))
    with step("validate on held-out text") as progress:
        engines = {label: out / "engine" / folder for label, (folder, _, _) in FORMS.items()}
        validations = pipeline.validated(engines, model, heldout, {BEST: LIMITS}, out, progress)
    with step("measure speed") as progress:
        everyone = {FLOAT: out / "engine/float", **engines}
        speeds = speed.measure({label: onnxruntime.OnnxRuntimeEngine(folder) for label, folder in everyone.items()})
        progress(1, 2)
        real = _real_size()
        progress(2, 2)
    write_report(out / pipeline.REPORT, validations, _speed_rows(validations, speeds))
    return Demonstration(validations, speeds, real, engines[BEST], out / pipeline.REPORT)


def _speed_rows(validations: list[Validation], speeds: dict[str, speed.Speed]) -> dict[str, list[str]]:
    """For the report's table: how many times as quick as the FP32 ONNX engine."""
    ratios = [speeds[FLOAT].over(speeds[validation.label]) for validation in validations]
    return {
        f"Prefill, times the {FLOAT} engine's speed": [f"{prefill:.2f}" for prefill, _ in ratios],
        f"Decode, times the {FLOAT} engine's speed": [f"{decode:.2f}" for _, decode in ratios],
    }


def _writers(out: Path, groups: str) -> list[Writer]:
    return [
        OnnxWriter(out / "onnx" / folder, activations)
        for folder, smoothing, activations in FORMS.values()
        if smoothing == groups
    ]


def _real_size() -> dict[str, speed.Speed]:
    """Speed of two random decoder layers, hidden 2048: what the bundled model is too small to show."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        save_random_llama(folder / "model", layers=LAYERS, vocabulary=1024, dtype=torch.float32)
        model = Model(Checkpoint(folder / "model"), find(RECIPE, RECIPES).family)
        source = Source(model, SmoothingSettings(groups="none"))
        export(source, [OnnxWriter(folder / "float", "float"), OnnxWriter(folder / "int8", "per-token")])
        engines = {
            FLOAT: onnxruntime.OnnxRuntimeEngine(folder / "float"),
            BEST: onnxruntime.OnnxRuntimeEngine(folder / "int8"),
        }
        return speed.measure(engines, rounds=5)
