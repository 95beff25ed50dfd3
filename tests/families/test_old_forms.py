"""The forms in which the Hub holds, or held, these models: each opens as what it is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from builders.transformers import TransformersEngine
from exporters.export import Source, export
from exporters.huggingface import SmoothedWriter
from recipes.families import open_model
from smoothquant.contract import TOLERANCE, relative_error
from smoothquant.layers import float_layer
from smoothquant.scheme import ACTIVATIONS
from smoothquant.settings import SmoothingSettings
from smoothquant.stream import quantize_layer, smoothed_layers
from tests import zoo
from tests.families.case import run
from tests.models import sample_ids
from tests.writers import w8a8_writer
from tests.zoo.forms import OLD_FORMS

FORMS = [(form, name) for form, old in OLD_FORMS.items() for name in old.layouts]
IDS = sample_ids(2, 24)


@pytest.mark.parametrize(("form", "name"), FORMS)
@torch.no_grad()
def test_an_old_form_is_the_same_model(form: str, name: str, tmp_path: Path) -> None:
    old = OLD_FORMS[form]
    expected = zoo.build(name, **old.changes)(IDS).logits
    old(zoo.save(name, tmp_path, **old.changes))
    model = open_model(tmp_path)
    found = run(model, IDS, (float_layer(model, n) for n in range(model.geometry.layers)))
    assert relative_error(found, expected) <= 5e-6


# those whose names differ from what they are exported with
RENAMED = [
    ("bloom-560m", "bloom"),
    ("opt-6.7b", "opt"),
    ("mixtral-fused", "mixtral"),
    ("qwen3-moe-fused", "qwen3-moe-unnormed"),
    ("falcon-2023", "falcon-40b"),
]


@pytest.mark.parametrize(("form", "name"), RENAMED)
@torch.no_grad()
def test_exports_of_an_old_form_load(form: str, name: str, tmp_path: Path) -> None:
    """Under the names that transformers has today, whatever the checkpoint's were."""
    old = OLD_FORMS[form]
    expected = zoo.build(name, **old.changes)(IDS).logits
    old(zoo.save(name, tmp_path / "model", **old.changes))
    model = open_model(tmp_path / "model")
    absmax = {linear: torch.linspace(0.5, 8, columns) for linear, (_, columns) in model.linears()}
    source = Source(model, SmoothingSettings(0.5), absmax, {"model": "m"})
    export(source, [SmoothedWriter(tmp_path / "hf"), w8a8_writer(tmp_path / "w8a8", "per-tensor")])
    assert relative_error(TransformersEngine(tmp_path / "hf").logits(IDS), expected) <= TOLERANCE
    layers = smoothed_layers(model, absmax, SmoothingSettings(0.5))
    quantized = run(model, IDS, (quantize_layer(layer).runnable(ACTIVATIONS["per-tensor"]) for layer in layers))
    assert relative_error(TransformersEngine(tmp_path / "w8a8").logits(IDS), quantized) <= 1e-5
