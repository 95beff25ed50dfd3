"""The W8A8 model in compressed-tensors' int-quantized format, which vLLM serves and transformers loads.

    <linear>.weight        int8 (out, in)
    <linear>.weight_scale  float32 (out, 1)
    <linear>.input_scale   float32 (1,), static activations only
    everything else        as in the float checkpoint, smoothing folded into the norms

    config.json: quantization_config {quant_method: compressed-tensors, format: int-quantized, config_groups: ...}

Scales stay float32 whatever the checkpoint's dtype: rounded to bfloat16 they would be off by up to 0.4 %.
Format: https://github.com/vllm-project/compressed-tensors (quantization_config, IntQuantizationCompressor).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from exporters.export import Source, check_folded, check_static
from exporters.huggingface.smoothed import norm_tensors, unsmoothed
from exporters.sidecars import copy_tokenizer
from smoothquant.artifacts.safetensors_files import Planned
from smoothquant.artifacts.shards import MAX_SHARD, SafetensorsShards
from smoothquant.model import Model
from smoothquant.scheme import scheme_of
from smoothquant.stream import QuantizedLayer, SmoothedLayer
from smoothquant.workspace import Workspace, write_json


class W8A8Writer:
    """Writes the W8A8 checkpoint to the folder `out`. activations: "per-token" (dynamic) or "per-tensor" (static).

    kept: module names of linears to leave in float (`smoothquant.static`).
    """

    step = "export w8a8"
    weights: str | None = "per-channel"

    def __init__(
        self,
        out: str | Path,
        activations: str = "per-token",
        max_shard: int = MAX_SHARD,
        kept: Sequence[str] = (),
    ) -> None:
        self.out, self.activations, self.max_shard, self.kept = Path(out), activations, max_shard, tuple(kept)
        self.schemes = (scheme_of(activations, float_linears=tuple(kept)),)
        self.options: Mapping = {}

    def check(self, source: Source) -> None:
        check_folded(source, self.out)
        if self.activations == "per-tensor":
            check_static(source, self.out)

    def nbytes(self, model: Model) -> int:
        return sum(planned.nbytes for planned in self._plan(model).values())

    def begin(self, model: Model, work: Workspace) -> None:
        self.model, self.work = model, work
        self.files = SafetensorsShards(work.folder, self._plan(model), self.max_shard)

    def write(self, layer: SmoothedLayer, quantized: QuantizedLayer | None) -> None:
        assert quantized is not None  # promised by the class attribute `weights`
        model = self.model
        for name, tensor in norm_tensors(model, layer.index, quantized.norms):
            self._put(name, tensor)
        for name, roles in model.stored.items():
            full = model.family.module(layer.index, name)
            biases = {role: bias for role in roles if (bias := layer.bias(role)) is not None}
            if biases:
                self._put(f"{full}.bias", model.join(name, biases))
            if full in self.kept or roles[0] in quantized.float_weights:
                self._put(f"{full}.weight", model.join(name, {role: layer.weight(role) for role in roles}))
                continue
            linears = {role: quantized.linears[role] for role in roles}
            self._put(f"{full}.weight", model.join(name, {role: linear.weight for role, linear in linears.items()}))
            scales = {role: linear.weight_scale for role, linear in linears.items()}
            self._put(f"{full}.weight_scale", model.join(name, scales)[:, None])
            if self.activations == "per-tensor":
                input_scale = linears[roles[0]].input_scale  # one input, one scale
                assert input_scale is not None  # `check` has seen to it
                self._put(f"{full}.input_scale", input_scale.reshape(1))

    def end(self) -> None:
        for name in unsmoothed(self.model):
            self.files.write_rows(name, self.model.rows(name))
        config = dict(self.model.checkpoint.config)
        ignore = [*self.model.float_linears(), *map(_anywhere, self.kept)]
        config["quantization_config"] = quantization_config(self.activations, ignore)
        write_json(self.work.path("config.json"), config)
        copy_tokenizer(self.model, self.work.folder)

    def _plan(self, model: Model) -> dict[str, Planned]:
        linears = {f"{name}.weight": name for name, _ in model.linears() if name not in self.kept}
        plan = {}
        for tensor, shape in model.expected().items():
            if tensor in linears:
                plan[tensor] = Planned(shape, torch.int8)
                plan[f"{linears[tensor]}.weight_scale"] = Planned((shape[0], 1), torch.float32)
                if self.activations == "per-tensor":
                    plan[f"{linears[tensor]}.input_scale"] = Planned((1,), torch.float32)
            else:
                plan[tensor] = Planned(shape, model.info(tensor).dtype)
        return plan

    def _put(self, name: str, tensor: Tensor) -> None:
        self.files.write(name, tensor.to(self.files.plan[name].dtype))


def _anywhere(name: str) -> str:
    """A linear's name for `ignore`; an expert's whatever its MLP is called, since transformers renames Mixtral's."""
    layer, experts, rest = name.partition(".experts.")
    return f"re:^{re.escape(layer.rpartition('.')[0])}\\.[^.]+\\.experts\\.{re.escape(rest)}$" if experts else name


def quantization_config(activations: str, ignore: list[str]) -> dict:
    """The `quantization_config` of config.json. ignore: linears that stay float."""
    dynamic = activations == "per-token"
    int8 = {"num_bits": 8, "type": "int", "symmetric": True, "group_size": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**int8, "strategy": "channel", "dynamic": False},
                "input_activations": {**int8, "strategy": "token" if dynamic else "tensor", "dynamic": dynamic},
                "output_activations": None,
            }
        },
        "ignore": ignore,
        "kv_cache_scheme": None,
    }
