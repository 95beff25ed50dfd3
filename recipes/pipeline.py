"""All of it: from a float checkpoint to a validated engine, in one folder, resumable.

    OUT/act_scales.safetensors     calibrate
    OUT/w8a8/, OUT/onnx/           one pass over the layers
    OUT/engine/                    build
    OUT/validation.json, report.html

Every step leaves its output whole or not at all, with the inputs that made it; a finished step with unchanged
inputs is not done again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from act_scales.collect import collect
from act_scales.store import load_act_scales
from act_scales.text import Text, load_text
from builders import onnxruntime
from builders.validate import Thresholds, Validation, validate_engines
from builders.validate.report import write_json, write_report
from exporters.export import Source, Writer, export
from exporters.huggingface import W8A8Writer
from exporters.onnx import OnnxWriter
from recipes.recipe import Recipe
from smoothquant.errors import UserError
from smoothquant.model import Model
from smoothquant.settings import SmoothingSettings
from smoothquant.static import linears_to_keep
from smoothquant.workspace import load_manifest, read_json

Step = Callable[[str], AbstractContextManager[Callable[[int, int], None]]]  # name -> progress of a step

ACT_SCALES, VALIDATION, REPORT = "act_scales.safetensors", "validation.json", "report.html"


@dataclass(frozen=True)
class Plan:
    """What `run` does. text: to calibrate on; heldout: to validate on."""

    recipe: Recipe
    model: Model
    settings: SmoothingSettings
    text: Text
    heldout: Text
    out: Path
    activations: str = "per-token"


def source_of(model: Model, act_scales: str | Path | None, settings: SmoothingSettings) -> Source:
    """What an export starts from: the model, and its act scales checked against it."""
    fingerprints = {"model": model.checkpoint.fingerprint}
    if act_scales is None:
        return Source(model, settings, None, fingerprints)
    scales = load_act_scales(act_scales).for_model(model)
    fingerprints |= {"act_scales": scales.fingerprint}
    return Source(model, settings, scales.input_absmax, fingerprints, scales.output_absmax)


def split_text(source: str, model: Model, recipe: Recipe, heldout: int) -> tuple[Text, Text]:
    """Calibration and held-out text from one source: the last `heldout` sequences are not calibrated on."""
    text = load_text(source, model.checkpoint.folder, recipe.samples + heldout, recipe.length)
    if len(text.sequences) < 2:
        raise UserError(
            f"{source}: {text.tokens} tokens are too few to calibrate on one part and validate on another",
            expected=f"at least {2 * recipe.length} tokens",
            do="give more text, or a held-out text with --heldout",
        )
    heldout = min(heldout, len(text.sequences) // 2)
    return (
        replace(text, sequences=text.sequences[:-heldout]),
        replace(text, sequences=text.sequences[-heldout:]),
    )


def run(plan: Plan, step: Step, *, overwrite: bool = False) -> Validation:
    """Calibrate, export, build, validate. Raises UserError at the first step that cannot be done."""
    out = plan.out
    with step("calibrate") as progress:
        scales = out / ACT_SCALES
        collect(plan.model, plan.text, scales, overwrite=overwrite, progress=progress)
    with step("smooth, quantize, export") as progress:
        source = source_of(plan.model, scales, plan.settings)
        static = plan.activations == "per-tensor"
        kept = linears_to_keep("auto" if static else "none", plan.model, source.input_absmax, plan.settings)
        writers: list[Writer] = [
            W8A8Writer(out / "w8a8", plan.activations, kept=kept),
            OnnxWriter(out / "onnx", plan.activations, kept=kept),
        ]
        export(source, writers, overwrite=overwrite, progress=progress)
    with step("build the engine") as progress:
        onnxruntime.build(out / "onnx", out / "engine", overwrite=overwrite)
        progress(1, 1)
    with step("validate") as progress:
        return validated(
            {"engine": out / "engine"}, plan.model, plan.heldout, {"engine": plan.recipe.thresholds}, out, progress
        )[0]


def validated(
    engines: Mapping[str, Path],
    model: Model,
    text: Text,
    thresholds: Mapping[str, Thresholds],
    out: Path,
    progress: Callable[[int, int], None],
    *,
    exact: bool = False,
) -> list[Validation]:
    """Validate engines; leave `validation.json` and `report.html` in `out`, unless they are there for these inputs."""
    key = _fingerprint(
        [load_manifest(folder)["inputs"] for folder in engines.values()],
        model.checkpoint.fingerprint,
        text.fingerprint,
        {label: asdict(limits) for label, limits in thresholds.items()},
        exact,
    )
    done = read_json(out / VALIDATION)
    if done.get("inputs") == key and (out / REPORT).exists():
        progress(1, 1)
        return [Validation.from_dict(content) for content in done["validations"]]
    found = validate_engines(engines, model, text, thresholds, exact=exact, progress=progress)
    write_report(out / REPORT, found)
    write_json(out / VALIDATION, found, inputs=key)
    return found


def _fingerprint(*inputs: object) -> str:
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]
