"""How an engine was smoothed and quantized, by what its folder says: enough to compute it again, layer by layer.

    smoothquant/manifest.json          what it was made from: model, smoothing settings, form of activations and weights
    smoothquant/smoothing.safetensors  <linear>.smoothing_scale float32 (in,), where the input is smoothed
                                       <linear>.input_absmax    float32 (in,), calibrated maxima of the smoothed input
                                       <layer>.key.cache_scale, <layer>.value.cache_scale  float32, of an INT8 cache

The layers are rebuilt from the recorded scales, not from the equation that once gave them: int8 weights and static
input scales come out bit for bit as the engine holds them. (A norm's folded gain is gain / s once more. In 16 bits
that is the engine's own; in float32 it may be one rounding off, like any other float32 operation.)
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from builders.engine import export_inputs
from smoothquant import smoothing
from smoothquant.errors import UserError
from smoothquant.layers import FloatLayer
from smoothquant.model import Model
from smoothquant.quantization import GRANULARITIES
from smoothquant.settings import ABSMAX, CACHE_SCALE, CACHED, KV_CACHES, SCALE, SMOOTHING, SmoothingSettings
from smoothquant.stream import SmoothedLayer
from smoothquant.workspace import load_manifest

ACTIVATIONS = ("per-token", "per-tensor", "float")
LM_HEADS = ("float", "int8")


@dataclass(frozen=True)
class Scheme:
    """Smoothing and quantization of one engine.

    key: identity; two engines with the same key quantize alike, and share one pass over the layers.
    activations: "per-token", "per-tensor", or "float": nothing is quantized. lm_head: "float" or "int8" (per token).
    settings: says which of the recorded scales were folded into what. weights: "per-channel" or "per-tensor".
    smoothing_scale, input_absmax: by linear, float32 (in,). float_linears: module names of those left in float.
    cache_scale: by layer and part, of an 8-bit KV cache; empty for a float one. ranks: of tensor parallelism.
    """

    key: str
    activations: str
    lm_head: str
    smoothing_scale: Mapping[str, Tensor] = field(repr=False)
    input_absmax: Mapping[str, Tensor] = field(repr=False)
    settings: SmoothingSettings = field(default_factory=SmoothingSettings)
    weights: str = "per-channel"
    float_linears: frozenset[str] = frozenset()
    cache_scale: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    ranks: int = 1

    def column(self, model: Model, index: int, role: str) -> Tensor | None:
        """smoothing_scale (in,) of a linear, None where its input is as it was."""
        return self.smoothing_scale.get(model.linear(index, role))

    def cache_scales(self, model: Model, index: int) -> tuple[Tensor, Tensor] | None:
        """Of the keys and values of a layer, None for a float cache."""
        if not self.cache_scale:
            return None
        key, value = (self.cache_scale[model.family.module(index, part)] for part in CACHED)
        return key, value

    def layer(self, model: Model, index: int, source: FloatLayer) -> SmoothedLayer:
        """One layer of the checkpoint with the recorded smoothing folded in."""
        geometry, names = model.geometry, {role: model.linear(index, role) for role in model.roles}
        layer = SmoothedLayer(
            model,
            index,
            source,
            norms=dict(source.norms),
            input_absmax={role: self.input_absmax[name] for role, name in names.items() if name in self.input_absmax},
            column={role: self.smoothing_scale[name] for role, name in names.items() if name in self.smoothing_scale},
        )
        for group in self.settings.chosen(model.groups, model.quantized_roles):
            scale = layer.column.get(group.linears[0])
            if scale is None:
                continue
            if group.through == "norm":
                layer.norms[group.source] = source.norms[group.source].divided(scale)
            elif group.through == "run-time":
                layer.smoother |= dict.fromkeys(group.linears, scale)
            elif group.through == "attention":  # equal within a kv head's query heads
                layer.row[group.source] = smoothing.share_over_query_heads(scale, geometry.kv_heads, geometry.head_dim)
            else:
                layer.row[group.source] = scale
        return layer


def read_scheme(folder: str | Path) -> Scheme:
    """The scheme of a finished export or engine folder. Raises UserError if it does not explain itself."""
    folder = Path(folder)
    inputs = export_inputs(load_manifest(folder))
    activations, lm_head = inputs.get("activations", "float"), inputs.get("lm_head", "float")
    if activations == "both":
        raise UserError(
            f"{folder}: two graphs, per token and per tensor",
            expected="one of them",
            do=f"smoothquant build onnxruntime {folder} --act per-token (or per-tensor) --out ENGINE; validate that",
        )
    weights, kv_cache = inputs.get("weights", GRANULARITIES[0]), inputs.get("kv_cache", KV_CACHES[0])
    for name, found, known in (
        ("activations", activations, ACTIVATIONS),
        ("lm_head", lm_head, LM_HEADS),
        ("weights", weights, GRANULARITIES),
        ("KV cache", kv_cache, KV_CACHES),
    ):
        if found not in known:
            raise UserError(f"{folder}: {name} {found!r}", expected=f"one of {', '.join(known)}", do="export it again")
    try:
        content = (folder / SMOOTHING).read_bytes()
        tensors = load(content)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{folder / SMOOTHING}: cannot be read ({error})",
            expected="the smoothing scales that every export records",
            do="make it again with smoothquant export",
        ) from error
    settings, kept = SmoothingSettings(**inputs.get("smoothing", {})), inputs.get("float_linears", [])
    ranks = inputs.get("tp", 1)
    facts = f"{activations} {lm_head} {weights} {settings.groups} {kept} {kv_cache} {ranks}\n"
    key = hashlib.sha256(facts.encode() + content).hexdigest()[:16]
    scales, ranges = _ending(tensors, SCALE), _ending(tensors, ABSMAX)
    cache = _ending(tensors, CACHE_SCALE) if kv_cache == "int8" else {}
    return Scheme(key, activations, lm_head, scales, ranges, settings, weights, frozenset(kept), cache, ranks)


def _ending(tensors: Mapping[str, Tensor], end: str) -> dict[str, Tensor]:
    return {name.removesuffix(end): value.to(torch.float32) for name, value in tensors.items() if name.endswith(end)}
