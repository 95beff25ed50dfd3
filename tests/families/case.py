"""One layout of the zoo with all that is made of it, each thing once and when it is first asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from act_scales.collect import collect
from act_scales.store import ActScales
from act_scales.text import Text
from exporters.export import Source, export
from exporters.huggingface import ModelOptWriter, SmoothedWriter, W8A8Writer
from recipes.families import open_model
from smoothquant import decoder
from smoothquant.attention import patterns
from smoothquant.layers import Layer, float_layer
from smoothquant.model import Model
from smoothquant.scheme import ACTIVATIONS
from smoothquant.settings import SmoothingSettings
from smoothquant.stream import SmoothedLayer, quantize_layer, smoothed_layers
from tests import zoo
from tests.models import sample_ids
from tests.writers import onnx_writer, w8a8_writer

SETTINGS = SmoothingSettings(0.5)
WRITERS: dict[str, Callable[[Path], object]] = {
    "hf": SmoothedWriter,
    "w8a8": W8A8Writer,
    "w8a8 static": lambda out: w8a8_writer(out, "per-tensor"),
    "modelopt": ModelOptWriter,
    "float": lambda out: onnx_writer(out, "float"),
    "per-token": lambda out: onnx_writer(out, "per-token"),
    "per-tensor": lambda out: onnx_writer(out, "per-tensor"),
    "per-token fp16": lambda out: onnx_writer(out, "per-token", body="fp16"),
    "per-token bf16": lambda out: onnx_writer(out, "per-token", body="bf16"),
    "per-tensor fp16": lambda out: onnx_writer(out, "per-tensor", body="fp16"),
}


@dataclass(frozen=True)
class Case:
    """name: of the layout; root: a folder of its own; numbers: changes to its config."""

    name: str
    root: Path
    numbers: Mapping[str, object] = field(default_factory=dict)

    @cached_property
    def folder(self) -> Path:
        return zoo.save(self.name, self.root / "model", **self.numbers)

    @cached_property
    def model(self) -> Model:
        return open_model(self.folder, length=zoo.ZOO[self.name].length)

    @cached_property
    def transformers(self) -> torch.nn.Module:
        return AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32)

    @cached_property
    def act_scales(self) -> ActScales:
        text = Text(tuple(sample_ids()), "sample")
        return collect(self.model, text, self.root / "act_scales.safetensors", dtype="float32")

    @cached_property
    def source(self) -> Source:
        scales, names = self.act_scales, {"model": self.model.checkpoint.fingerprint}
        held = scales.held_absmax
        maxima = (scales.input_absmax, names, scales.output_absmax)
        return Source(self.model, SETTINGS, *maxima, held_absmax=held, input_mean_square=scales.input_mean_square)

    def export(self, form: str) -> Path:
        """The folder of an export: a key of WRITERS."""
        out = self.root / form.replace(" ", "-")
        export(self.source, [WRITERS[form](out)])  # one that is made already is left alone
        return out

    @torch.no_grad()
    def logits(self, ids: Tensor, **inputs: Tensor) -> Tensor:
        """By transformers, of the original model."""
        return self.transformers(ids, **inputs).logits

    def ours(self, ids: Tensor, settings: SmoothingSettings | None = None) -> Tensor:
        """By our decoder in float32: the original model's, or the smoothed one's."""
        if settings:
            return run(self.model, ids, self.smoothed(settings))
        return run(self.model, ids, (float_layer(self.model, n) for n in range(self.model.geometry.layers)))

    def w8a8(self, ids: Tensor, act: str, dtype: torch.dtype = torch.float64) -> Tensor:
        """By our W8A8 arithmetic. act: "per-token" or "per-tensor"."""
        layers = (quantize_layer(layer).runnable(ACTIVATIONS[act]) for layer in self.smoothed(SETTINGS))
        return run(self.model, ids, layers, dtype)

    def smoothed(self, settings: SmoothingSettings) -> Iterator[SmoothedLayer]:
        scales = self.act_scales
        return smoothed_layers(self.model, scales.input_absmax, settings, output_absmax=scales.output_absmax)


@torch.no_grad()
def run(model: Model, ids: Tensor, layers: Iterator[Layer], dtype: torch.dtype = torch.float32) -> Tensor:
    """Logits of ids (batch, tokens) through these layers."""
    hidden, positions = decoder.embed(model, ids, dtype), patterns(model, ids.shape[1], dtype)
    for layer in layers:
        hidden = decoder.forward(model, layer, hidden, positions)
    return decoder.logits(model, hidden)
