"""The forms of a TensorRT-LLM checkpoint side by side: the bundled model on held-out text, every checkpoint run by the
interpreter of the format, in the arithmetic of NVIDIA's kernels (activations in float32)."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from act_scales.collect import collect
from act_scales.text import load_text
from builders.validate import validate_engines
from exporters.export import export
from exporters.trtllm import TrtllmWriter, choose
from recipes import pipeline, tiny_llama
from recipes.families import open_model
from recipes.models import RECIPES
from recipes.recipe import find
from tests.benchmarks.onnx_forms import COLUMNS, HELDOUT, cells, facts
from tests.benchmarks.results import Row, publish

RECIPE = find("tiny-llama", RECIPES)
FORMS: dict[str, dict] = {  # options of `export trtllm`
    "per token (default)": {},
    "per token, --weights per-tensor": {"weights": "per-tensor"},
    "per token, --runtime-smoother": {"groups": "run-time"},
    "per token, --kv int8": {"kv": "int8"},
    "per token, --groups paper": {"groups": "paper"},
    "--act per-tensor": {"activations": "per-tensor"},
    "--act per-tensor --weights per-tensor": {"activations": "per-tensor", "weights": "per-tensor"},
    "--act per-tensor --kv int8": {"activations": "per-tensor", "kv": "int8"},
    "--no-plugins": {"activations": "per-tensor", "plugin": False, "groups": "unfolded"},
}


def main() -> None:
    model = open_model(tiny_llama.PATH)
    text = load_text(tiny_llama.CALIBRATION_TEXT, tiny_llama.PATH, RECIPE.samples, RECIPE.length)
    heldout = load_text(tiny_llama.EVALUATION_TEXT, tiny_llama.PATH, HELDOUT, RECIPE.length)
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        collect(model, text, root / "act_scales.safetensors")
        folders = {label: root / str(number) for number, label in enumerate(FORMS)}
        source = pipeline.source_of(model, root / "act_scales.safetensors", RECIPE.settings(model))
        for label, options in FORMS.items():
            chosen = dict(options)
            kv, groups = chosen.pop("kv", "float"), chosen.pop("groups", "default")
            writer = TrtllmWriter(folders[label], choose(**chosen), kv=kv)
            smoothing = writer.smoothing.settings(model, RECIPE.alpha, groups)
            export(replace(source, settings=smoothing), [writer])
        found = validate_engines(folders, model, heldout)
    details = {"columns": list(COLUMNS), "forms": {validation.label: facts(validation) for validation in found}}
    publish("trtllm_forms", [Row(v.label, ", ".join(cells(v))) for v in found], details)


def table(details: Mapping) -> str:
    """Markdown, a line per form."""
    head = ["", *details["columns"]]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    lines += [f"| {label} | {' | '.join(found['cells'])} |" for label, found in details["forms"].items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
