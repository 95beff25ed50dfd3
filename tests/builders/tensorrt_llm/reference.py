"""The Hugging Face model itself, in float64, computing with the W8A8 linears that were written.

Every linear of a layer is replaced by one that quantizes and dequantizes in plain float64; all else (attention,
positions, norms' places, residuals) is transformers' own code, with its roundings to float32 taken out.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import torch
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache, PreTrainedModel
from transformers.models.falcon import modeling_falcon

from tests.builders.tensorrt_llm.checkpoints import Linear, Written


class W8A8(torch.nn.Module):
    """One Hugging Face linear. parts: which rows of `linear` it has, in its own order; shards: tensor-parallel ranks
    that each quantize their own channels."""

    def __init__(self, linear: Linear, rows: Tensor, algorithm: str, shards: int) -> None:
        super().__init__()
        weight = torch.cat(
            [q.double() * scale.double()[:, None] for q, scale in zip(linear.q, linear.scale, strict=True)]
        )
        self.matrix = weight[rows]
        self.offset = None if linear.bias[0] is None else torch.cat(linear.bias)[rows].double()
        self.smoother, self.amax, self.shards = linear.smoother, linear.amax, shards
        self.form = "per token" if algorithm.endswith("PER_TOKEN_PLUGIN") else algorithm.rpartition("_")[2]

    def forward(self, x: Tensor) -> Tensor:
        x = x / self.smoother
        if self.form == "per token":
            x = torch.cat([self.per_token(part) for part in x.chunk(self.shards, -1)], -1)
        else:  # the plugins multiply by a stored float32, Q/DQ divides by one
            multiplier, step = torch.tensor([127 / self.amax, self.amax / 127]).double()
            x = (x * multiplier if self.form == "PLUGIN" else x / step).round().clamp(-128, 127) * step
        return functional.linear(x, self.matrix, self.offset)

    @staticmethod
    def per_token(x: Tensor) -> Tensor:
        amax = x.abs().amax(-1, keepdim=True)
        return (x * (127 / amax)).round().clamp(-128, 127) * (amax / 127)


class Rms(torch.nn.Module):
    """RMS norm in the dtype of its input."""

    def __init__(self, norm: torch.nn.Module) -> None:
        super().__init__()
        self.weight, self.epsilon = norm.weight, norm.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + self.epsilon).sqrt() * self.weight


class Gelu(torch.nn.Module):
    """TensorRT-LLM's, by whatever name."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.gelu(x, approximate="tanh")


class QuantizedCache(DynamicCache):
    """Hands keys and values on as an INT8 cache gives them back, one scale for each layer."""

    def __init__(self, scales: list[float]) -> None:
        super().__init__()
        self.scales = scales

    def update(self, k: Tensor, v: Tensor, layer_idx: int, *arguments: object) -> tuple[Tensor, Tensor]:
        scale = torch.tensor(self.scales[layer_idx]).double()
        k, v = ((x * (1 / scale)).round().clamp(-128, 127) * scale for x in (k, v))
        return super().update(k, v, layer_idx, *arguments)


def exact(model: PreTrainedModel) -> PreTrainedModel:
    """A float64 copy without roundings to float32, with TensorRT-LLM's gelu."""
    model = copy.deepcopy(model).double().eval()
    if model.config.model_type != "bloom":
        model.set_attn_implementation("sdpa")
    for name, module in list(model.named_modules()):
        replacement = Rms(module) if type(module).__name__.endswith("RMSNorm") else None
        if type(module).__name__ == "GELUActivation":
            replacement = Gelu()
        if replacement is not None:
            model.set_submodule(name, replacement)
    return model


def quantized(model: PreTrainedModel, written: Written) -> PreTrainedModel:
    """A float64 copy with the linears as they were written."""
    model, names = exact(model), written.names
    for (number, name), linear in written.linears.items() if written.algorithm else ():
        shards = written.tp if name in ("attention.dense", "mlp.proj") else 1
        lengths = [len(q) for q in linear.q]
        if name != "attention.qkv" or len(names.qkv) > 1:
            rows = list(torch.arange(sum(lengths)).split(lengths))
        elif written.rows is None:
            rows = [torch.arange(sum(lengths))]
        else:
            rows = [written.rows.argsort()]
        theirs = {"attention.dense": names.dense, "mlp.fc": names.fc, "mlp.gate": names.gate, "mlp.proj": names.proj}
        modules = names.qkv if name == "attention.qkv" else (theirs[name],)
        for module, chosen in zip(modules, rows, strict=True):
            replacement = W8A8(linear, chosen, written.algorithm or "", shards)
            model.set_submodule(f"{names.layers}.{number}.{module}", replacement)
    return model


@torch.no_grad()
def logits(model: PreTrainedModel, ids: Tensor, kv_scales: list[float] | None = None) -> Tensor:
    """(batch, tokens, vocab) float64 of a model from `exact` or `quantized`."""
    options = {"past_key_values": QuantizedCache(kv_scales), "use_cache": True} if kv_scales else {"use_cache": False}
    with _no_float32():
        return model(ids, **options).logits


@contextmanager
def _no_float32() -> Iterator[None]:
    """Softmax in the dtype of the scores (BLOOM's is in float32), slopes not rounded to bfloat16 (Falcon's are)."""
    softmax = functional.softmax
    with (
        mock.patch.object(functional, "softmax", lambda x, dim, dtype=None: softmax(x, dim)),
        mock.patch.object(modeling_falcon, "build_alibi_tensor", _alibi),
    ):
        yield


def _alibi(attention_mask: Tensor, num_heads: int, dtype: torch.dtype) -> Tensor:
    assert num_heads & (num_heads - 1) == 0, "a power of two"
    slopes = torch.tensor([2.0 ** (-8 * (head + 1) / num_heads) for head in range(num_heads)]).to(dtype)
    position = (attention_mask.cumsum(-1) - 1)[:, None, :].to(dtype)
    return (slopes[:, None] * position).reshape(-1, 1, attention_mask.shape[1])
