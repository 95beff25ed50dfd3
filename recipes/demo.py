"""The demonstration: the bundled model through the whole pipeline, naively and with SmoothQuant, side by side.

    OUT/act_scales.safetensors, OUT/w8a8/, OUT/onnx/FORM/, OUT/engine/FORM/, OUT/validation.json, OUT/report.html

FORM: float (the FP32 ONNX engine, to compare speed with), and W8A8 naive and smoothquant, each with static per-tensor
and dynamic per-token activations.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch

from act_scales.text import load_text
from builders import onnxruntime
from builders.engine import speed
from builders.validate import Thresholds, Validation
from builders.validate.report import write_report
from exporters.export import Source, export
from exporters.onnx import OnnxWriter
from recipes import pipeline, tiny_llama
from recipes.families import open_model
from recipes.models import RECIPES
from recipes.recipe import Recipe, find
from recipes.synthetic import save_random_llama
from recipes.targets import TARGETS
from smoothquant.capacity import FOLDED
from smoothquant.checkpoint import Checkpoint
from smoothquant.files import scratch
from smoothquant.model import Model
from smoothquant.scheme import IN_FLOAT, PER_TOKEN, scheme_of
from smoothquant.settings import SmoothingSettings

FLOAT = "FP32 ONNX"
STATIC = scheme_of("per-tensor")
FORMS = {  # label -> (folder, smoothing groups, scheme)
    "naive, per tensor": ("naive-per-tensor", "none", STATIC),
    "naive, per token": ("naive-per-token", "none", PER_TOKEN),
    "SmoothQuant, per tensor": ("smoothquant-per-tensor", "default", STATIC),
    "SmoothQuant, per token": ("smoothquant-per-token", "default", PER_TOKEN),
}
BEST = "SmoothQuant, per token"
HELDOUT = 32  # sequences
RECIPE = "tiny-llama"
LAYERS = 2  # decoder layers of the size of a real model, for speed
LIMITS = Thresholds(kl_mean=0.005, top1=0.95, perplexity_ratio=1.005)  # back to within 0.5 %


@dataclass(frozen=True)
class Demonstration:
    """What the demonstration found. speeds: by label, of the bundled model; real: of layers of a real model's size.
    folders: of all that was made, by label."""

    validations: list[Validation]
    speeds: dict[str, speed.Speed]
    real: dict[str, speed.Speed]
    folders: Mapping[str, Path]
    report: Path

    def speeds_as_dict(self) -> dict:
        return {
            name: {label: asdict(found) for label, found in speeds.items()}
            for name, speeds in (("bundled", self.speeds), ("hidden 2048", self.real))
        }


def demonstrate(out: Path, stage: pipeline.Stage, *, overwrite: bool = False) -> Demonstration:
    """Run the pipeline, then measure speed; finished stages are not done again, except the measuring."""
    recipe, model = find(RECIPE, RECIPES), open_model(tiny_llama.PATH)
    text = load_text(tiny_llama.CALIBRATION_TEXT, tiny_llama.PATH, recipe.samples, recipe.length)
    heldout = load_text(tiny_llama.EVALUATION_TEXT, tiny_llama.PATH, HELDOUT, recipe.length)
    made = pipeline.run(
        pipeline.RecipeRun(model, text, heldout, out, _outputs(recipe, model)), stage, overwrite=overwrite
    )
    with stage("measure speed") as progress:
        engines = {label: made.folders[label] for label in (FLOAT, *FORMS)}
        speeds = speed.measure({label: onnxruntime.OnnxRuntimeEngine(folder) for label, folder in engines.items()})
        progress(1, 2)
        real = _real_size()
        progress(2, 2)
    write_report(out / pipeline.REPORT, made.validations, _speed_rows(made.validations, speeds))
    return Demonstration(made.validations, speeds, real, made.folders, out / pipeline.REPORT)


def _outputs(recipe: Recipe, model: Model) -> tuple[pipeline.Output, ...]:
    """The engines, and the W8A8 checkpoint of the best one. No linear stays in float: naive means naive."""
    engine = partial(pipeline.Output, target=TARGETS["onnxruntime"], keep_float="none")
    naive, smoothed = FOLDED.settings(model, groups="none"), recipe.settings(model)
    settings = {"none": naive, "default": smoothed}
    return (
        engine(FLOAT, settings=naive, scheme=IN_FLOAT, form="float", thresholds=None),
        *(
            engine(
                label,
                settings=settings[groups],
                scheme=scheme,
                form=form,
                thresholds=LIMITS if label == BEST else Thresholds(),
            )
            for label, (form, groups, scheme) in FORMS.items()
        ),
        pipeline.Output("W8A8 checkpoint", TARGETS["w8a8"], smoothed, thresholds=None),
    )


def _speed_rows(validations: list[Validation], speeds: dict[str, speed.Speed]) -> dict[str, list[str]]:
    """For the report's table: how many times as quick as the FP32 ONNX engine."""
    ratios = [speeds[FLOAT].over(speeds[validation.label]) for validation in validations]
    return {
        f"Prefill, times the {FLOAT} engine's speed": [f"{prefill:.2f}" for prefill, _ in ratios],
        f"Decode, times the {FLOAT} engine's speed": [f"{decode:.2f}" for _, decode in ratios],
    }


def _real_size() -> dict[str, speed.Speed]:
    """Speed of two random decoder layers, hidden 2048: what the bundled model is too small to show."""
    with scratch() as folder:
        save_random_llama(folder / "model", layers=LAYERS, vocabulary=1024, dtype=torch.float32)
        model = Model(Checkpoint(folder / "model"), find(RECIPE, RECIPES).family)
        source = Source(model, SmoothingSettings(groups="none"))
        export(source, [OnnxWriter(folder / "float", IN_FLOAT), OnnxWriter(folder / "int8")])
        engines = {
            FLOAT: onnxruntime.OnnxRuntimeEngine(folder / "float"),
            BEST: onnxruntime.OnnxRuntimeEngine(folder / "int8"),
        }
        return speed.measure(engines, rounds=5)
