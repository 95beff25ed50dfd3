"""The record, executed: our decoder is transformers' Llama."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from smoothquant import decoder
from smoothquant.attention import patterns
from smoothquant.layers import float_layer
from smoothquant.model import Model
from tests.models import open_llama, sample_ids

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
VARIANTS = {
    "grouped heads": {},
    "full heads": {"num_key_value_heads": 4},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "tied embeddings": {"tie_word_embeddings": True},
    "wide heads": {"head_dim": 32},
    "llama3 rope": {"rope_parameters": LLAMA3_ROPE},
    "linear rope": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}},
}


def float_logits(model: Model, ids: torch.Tensor) -> torch.Tensor:
    hidden = decoder.embed(model, ids, torch.float32)
    positions = patterns(model, ids.shape[1], torch.float32)
    for index in range(model.geometry.layers):
        hidden = decoder.forward(model, float_layer(model, index), hidden, positions)
    return decoder.logits(model, hidden)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_logits_are_those_of_transformers(variant: str, make_llama: Callable[..., Path]) -> None:
    folder, ids = make_llama(**VARIANTS[variant]), sample_ids()
    expected = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
    found = float_logits(open_llama(folder), ids)
    # float32 rounding, summed over two layers in another order: a few units of 1.2e-7
    assert (found - expected).abs().max() <= 5e-6 * expected.abs().max()
