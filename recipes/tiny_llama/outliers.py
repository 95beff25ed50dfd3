"""Outlier channels for a model too small to have grown them, without changing what it computes.

For each norm and the linears that read it, over the channels j of largest mean |activation|:

    gain_j <- gain_j * OUTLIER_GAIN        W[:, j] <- W[:, j] / OUTLIER_GAIN        so W @ norm(h) stays what it was

Large models have such channels in the same places for every token (LLM.int8(), arXiv 2208.07339; SmoothQuant,
arXiv 2211.10438, figure 4), hence the choice by mean and not by maximum.
"""

import copy
from collections.abc import Iterator

import torch
from torch import nn
from transformers import LlamaForCausalLM

OUTLIER_CHANNELS = 4  # per norm
OUTLIER_GAIN = 64.0  # a power of two: multiplying by it is exact, and so is dividing while float16 stays normal
MAX_LOGIT_CHANGE = 1e-2


def norm_groups(model: LlamaForCausalLM) -> Iterator[tuple[str, nn.Module, tuple[nn.Linear, ...]]]:
    """Yields (name, norm, the linears that consume its output)."""
    for index, layer in enumerate(model.model.layers):
        attention, mlp = layer.self_attn, layer.mlp
        yield (
            f"model.layers.{index}.input_layernorm",
            layer.input_layernorm,
            (attention.q_proj, attention.k_proj, attention.v_proj),
        )
        yield (
            f"model.layers.{index}.post_attention_layernorm",
            layer.post_attention_layernorm,
            (mlp.gate_proj, mlp.up_proj),
        )


@torch.no_grad()
def inject_outliers(model: LlamaForCausalLM, sample: torch.Tensor) -> dict[str, list[int]]:
    """Change `model` in place, choosing channels on `sample`, token ids (batch, tokens).

    Returns {norm: its outlier channels}. Stops the run if the float16 logits do not stay what they were.
    """
    expected = copy.deepcopy(model).half().float()(sample).logits

    mean_abs: dict[str, torch.Tensor] = {}  # per norm (hidden,)
    hooks = [
        norm.register_forward_hook(
            lambda module, inputs, output, name=name: mean_abs.update({name: output.abs().mean(dim=(0, 1))})
        )
        for name, norm, _ in norm_groups(model)
    ]
    model(sample)
    for hook in hooks:
        hook.remove()

    chosen = {}
    for name, norm, consumers in norm_groups(model):
        channels = mean_abs[name].topk(OUTLIER_CHANNELS).indices.sort().values
        norm.get_parameter("weight")[channels] *= OUTLIER_GAIN
        for linear in consumers:
            linear.weight[:, channels] /= OUTLIER_GAIN
        chosen[name] = channels.tolist()

    deviation = (copy.deepcopy(model).half().float()(sample).logits - expected).abs().max().item()
    print(f"injected outliers; largest change of a logit in float16: {deviation:.1e}", flush=True)
    if not deviation <= MAX_LOGIT_CHANGE:
        raise SystemExit(
            f"injection changed a logit by {deviation:.1e}, allowed is {MAX_LOGIT_CHANGE:.0e}: "
            "weights divided by OUTLIER_GAIN probably underflow float16; use a smaller gain"
        )
    return chosen
