"""Measure the perplexity of a model in float and in W8A8, in one pass over its layers.

    perplexity = exp(mean of -log p(next token)) over tokens 2..n of every sequence

One sweep runs the stored layers and their smoothed and quantized form (`quantization.w8a8_linear`) side by side, in
float32, each with hidden states of its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from builders.validate.reference import HeldOutText
from smoothquant import decoder
from smoothquant.layers import FloatLayer, Layer
from smoothquant.listener import Listener
from smoothquant.model import Model
from smoothquant.scheme import PER_TOKEN
from smoothquant.settings import SmoothingSettings
from smoothquant.stream import check_scales, runnable, smooth_layer
from smoothquant.sweep import FLOAT, Progress, sweep
from smoothquant.workroom import Workroom

W8A8 = "w8a8"
SCHEME = PER_TOKEN  # what is measured


@dataclass(frozen=True)
class Perplexities:
    """Two perplexities of a model. plain: in float, as stored. w8a8: of its quantized form. predicted: the number of
    predicted tokens."""

    plain: float
    w8a8: float
    predicted: int


@torch.no_grad()
def perplexities(
    model: Model,
    text: HeldOutText,
    input_absmax: Mapping[str, Tensor],
    settings: SmoothingSettings,
    work: Workroom,
    *,
    device: str = "cpu",
    progress: Progress = lambda done, total: None,
) -> Perplexities:
    """Both perplexities of a text. The workspace `work` continues an interrupted pass.

    progress: called with (done, total), counted in layers and batches of the output head.
    Raises ActScalesError for act scales of another model, OutputError if the disk has no room for the hidden states.
    """
    check_scales(model, input_absmax, settings)
    layers = model.geometry.layers
    end = sweep(
        model,
        text.sequences,
        [Quantized(model, input_absmax, settings, device)],
        device=device,
        work=work,
        keep_last=True,
        progress=lambda done, _: progress(done, layers + len(text.sequences)),
    )
    losses = dict.fromkeys((FLOAT, W8A8), 0.0)
    for number, ids in enumerate(text.sequences):
        for form in losses:
            losses[form] += _loss(model, end.states(number, form).to(device), ids.to(device))
        progress(layers + number + 1, layers + len(text.sequences))
    predicted = sum(len(ids) - 1 for ids in text.sequences)
    return Perplexities(math.exp(losses[FLOAT] / predicted), math.exp(losses[W8A8] / predicted), predicted)


class Quantized(Listener):
    """A listener that runs a smoothed and quantized form of every layer beside the stored layer, without steps between
    smoothing and quantizing. settings: the smoothing settings. The scheme is `SCHEME`."""

    forms = MappingProxyType({W8A8: torch.float32})

    def __init__(
        self, model: Model, input_absmax: Mapping[str, Tensor], settings: SmoothingSettings, device: str
    ) -> None:
        self.model, self.input_absmax, self.settings, self.device = model, input_absmax, settings, device

    def enter(self, source: FloatLayer) -> dict[str, Layer]:
        layer = smooth_layer(self.model, source.index, self.input_absmax, self.settings, steps=(), source=source)
        return {W8A8: runnable(layer, SCHEME).to(self.device)}


def _loss(model: Model, hidden: Tensor, ids: Tensor) -> float:
    """The sum of -log p(next token) over a sequence. hidden: (tokens, hidden). ids: (tokens,)."""
    logits = decoder.logits(model, hidden[None])[0, :-1]
    return torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum").item()
