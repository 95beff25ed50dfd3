"""Perplexity of a model in float and in W8A8, in one pass over its layers.

    perplexity = exp(mean of -log p(next token)) over tokens 2..n of every sequence

Two sets of hidden states go through the layers side by side, in float32: through the layer as it is on disk, and
through its smoothed and quantized form (`quantization.w8a8_linear`, one dynamic scale per token). In memory: one layer,
and the hidden states of all sequences, twice.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from builders.validate.reference import Text
from smoothquant import decoder
from smoothquant.attention import patterns
from smoothquant.layers import Layer
from smoothquant.model import Model
from smoothquant.settings import SmoothingSettings
from smoothquant.stream import quantize_layer, smoothed_layers
from smoothquant.workspace import Workspace

Progress = Callable[[int, int], None]  # (done, total)
BATCH = 4096  # tokens that go through a layer together
KEEP_EVERY = 120.0  # seconds of work that an interruption may cost, beside the layer under way


@dataclass(frozen=True)
class Perplexities:
    """plain: of the model as stored, in float; w8a8: of its quantized form; over so many predicted tokens."""

    plain: float
    w8a8: float
    predicted: int


@torch.no_grad()
def perplexities(
    model: Model,
    text: Text,
    input_absmax: Mapping[str, Tensor],
    settings: SmoothingSettings,
    work: Workspace,
    *,
    device: str = "cpu",
    progress: Progress = lambda done, total: None,
) -> Perplexities:
    """Both perplexities of a text whose sequences have one length. An interrupted pass goes on from `work`.

    progress: called with (done, total), in layers and batches of the output head. Raises ActScalesError for act scales
    that are not the model's, OutputError for a disk without room for the hidden states.
    """
    ids = torch.stack(text.sequences)
    batches = ids.split(max(1, BATCH // ids.shape[1]))
    layers, total = model.geometry.layers, model.geometry.layers + len(batches)
    work.require(2 * ids.numel() * model.geometry.hidden_size * 4)
    hidden = work.state()
    if not hidden:
        embedded = decoder.embed(model, ids, torch.float32)
        hidden = {"plain": embedded, "w8a8": embedded.clone()}
    positions, kept = patterns(model, ids.shape[1], torch.float32, device), time.monotonic()
    progress(work.next_layer, total)
    for layer in smoothed_layers(model, input_absmax, settings, work.next_layer):
        running: dict[str, Layer] = {
            "plain": layer.source.to(device, torch.float32),
            "w8a8": quantize_layer(layer).runnable("per-token").to(device),
        }
        for name, form in running.items():
            for part in hidden[name].split(len(batches[0])):
                part.copy_(decoder.forward(model, form, part.to(device), positions))
        if time.monotonic() - kept > KEEP_EVERY and layer.index + 1 < layers:
            work.mark(layer.index + 1, hidden)
            kept = time.monotonic()
        progress(layer.index + 1, total)
        del layer, running, form
    losses = dict.fromkeys(hidden, 0.0)
    for number, batch in enumerate(batches):
        rows = slice(number * len(batches[0]), number * len(batches[0]) + len(batch))
        for name, states in hidden.items():
            losses[name] += _loss(model, states[rows].to(device), batch.to(device))
        progress(layers + number + 1, total)
    predicted = ids.shape[0] * (ids.shape[1] - 1)
    return Perplexities(math.exp(losses["plain"] / predicted), math.exp(losses["w8a8"] / predicted), predicted)


def _loss(model: Model, hidden: Tensor, ids: Tensor) -> float:
    """Sum of -log p(next token). hidden: (batch, tokens, hidden); ids: (batch, tokens)."""
    logits = decoder.logits(model, hidden)[:, :-1].flatten(0, 1)
    return torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum").item()
