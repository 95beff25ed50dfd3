"""How an engine was smoothed and quantized, by what its folder says: enough to compute it again, layer by layer.

    smoothquant/manifest.json          what it was made from: model, smoothing settings, quantization scheme
    smoothquant/smoothing.safetensors  the scales that were folded, and the ranges that static scales come from

The layers are rebuilt from the recorded scales, not from the equation that once gave them: int8 weights and static
input scales come out bit for bit as the engine holds them. (A norm's folded gain is gain / s once more. In 16 bits
that is the engine's own; in float32 it may be one rounding off, like any other float32 operation.)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from smoothquant.artifacts.ports import CACHED
from smoothquant.artifacts.record import as_json
from smoothquant.artifacts.smoothing_file import SmoothingFile, read_smoothing
from smoothquant.errors import UserError
from smoothquant.fold import Scales, SmoothedLayer, fold
from smoothquant.layers import FloatLayer
from smoothquant.model import Model
from smoothquant.scheme import FLOAT, Scheme
from smoothquant.settings import SmoothingSettings
from smoothquant.steps import Step, as_records, from_records, replay
from smoothquant.workspace import load_manifest


@dataclass(frozen=True)
class EngineScheme:
    """Smoothing and quantization of one engine.

    key: identity; two engines with the same key quantize alike, and share one pass over the layers.
    scheme: what is INT8. smoothing: the recorded scales. settings: say which of them were folded into what.
    ranks: of tensor parallelism. steps: between smoothing and storing.
    """

    key: str
    scheme: Scheme
    smoothing: SmoothingFile = field(default_factory=SmoothingFile)
    settings: SmoothingSettings = field(default_factory=SmoothingSettings)
    ranks: int = 1
    steps: tuple[Step, ...] = ()

    @property
    def activations(self) -> str:
        """ "per-token", "per-tensor", or "float": nothing is quantized."""
        return self.scheme.activations.form

    @property
    def weights(self) -> str:
        """ "per-channel" or "per-tensor"."""
        return self.scheme.weights.form

    @property
    def lm_head(self) -> str:
        """ "float" or "int8"."""
        return self.scheme.head.dtype

    @property
    def float_linears(self) -> tuple[str, ...]:
        """Module names of linears left in float."""
        return self.scheme.float_linears

    @property
    def smoothing_scale(self) -> Mapping[str, Tensor]:
        """By linear, float32 (in,)."""
        return self.smoothing.smoothing_scale

    @property
    def input_absmax(self) -> Mapping[str, Tensor]:
        """By linear, float32 (in,)."""
        return self.smoothing.input_absmax

    def column(self, model: Model, index: int, role: str) -> Tensor | None:
        """smoothing_scale (in,) of a linear, None where its input is as it was."""
        return self.smoothing_scale.get(model.linear(index, role))

    def cache_scales(self, model: Model, index: int) -> tuple[Tensor, Tensor] | None:
        """Of the keys and values of a layer, None for a float cache."""
        if self.scheme.kv_cache == FLOAT:
            return None
        key, value = (self.smoothing.cache_scale[model.family.module(index, part)] for part in CACHED)
        return key, value

    def layer(self, model: Model, index: int, source: FloatLayer) -> SmoothedLayer:
        """One layer of the checkpoint with the recorded smoothing folded in and the recorded steps done."""
        names = {role: model.linear(index, role) for role in model.roles}
        scales = Scales(
            column={role: self.smoothing_scale[name] for role, name in names.items() if name in self.smoothing_scale},
            input_absmax={role: self.input_absmax[name] for role, name in names.items() if name in self.input_absmax},
        )
        return replay(self.steps, fold(model, index, source, self.settings, scales))


def read_scheme(folder: str | Path) -> EngineScheme:
    """The scheme of a finished export or engine folder. Raises UserError if it does not explain itself."""
    folder = Path(folder)
    origin = load_manifest(folder).origin
    if len(origin.schemes) > 1:
        raise UserError(
            f"{folder}: two graphs, per token and per tensor",
            expected="one of them",
            do=f"smoothquant build onnxruntime {folder} --act per-token (or per-tensor) --out ENGINE; validate that",
        )
    recorded, ranks = read_smoothing(folder), origin.trtllm.tp if origin.trtllm else 1
    steps = from_records(origin.steps)
    facts = [as_json(origin.scheme), as_json(origin.smoothing), ranks, as_records(steps), recorded.digest]
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    return EngineScheme(key, origin.scheme, recorded, origin.smoothing, ranks, steps)
