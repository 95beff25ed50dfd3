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

from exporters.export import Source, check_static
from exporters.huggingface.tensors import CheckpointTensor, CheckpointWriter, float_tensors
from smoothquant.artifacts.safetensors_files import Planned
from smoothquant.artifacts.shards import MAX_SHARD
from smoothquant.errors import UserError
from smoothquant.model import Model
from smoothquant.scheme import FLOAT, PER_TOKEN, Scheme
from smoothquant.stream import QuantizedLayer, QuantizedLinear, SmoothedLayer


class W8A8Writer(CheckpointWriter):
    """Writes the W8A8 checkpoint to the folder `out`. scheme: int8 weights per output channel, float cache and head."""

    step = "export w8a8"
    wider = 'write "torch_dtype": "bfloat16" into config.json of the model: who loads it casts the weights'

    def __init__(self, out: str | Path, scheme: Scheme = PER_TOKEN, max_shard: int = MAX_SHARD) -> None:
        super().__init__(out, max_shard)
        if (scheme.weights, scheme.kv_cache, scheme.head) != (PER_TOKEN.weights, FLOAT, FLOAT):
            raise UserError(
                f"{out}: {scheme.weights.form} weights, a KV cache in {scheme.kv_cache.dtype}, a head in "
                f"{scheme.head.dtype}",
                expected=f"a W8A8 checkpoint: {PER_TOKEN.weights.form} weights, cache and head in float",
            )
        self.scheme, self.kept = scheme, scheme.float_linears
        self.schemes = (scheme,)
        self.options: Mapping = {}

    def check(self, source: Source) -> None:
        super().check(source)
        if self.scheme.activations.static:
            check_static(source, self.out)

    def plan(self, model: Model) -> dict[str, CheckpointTensor]:
        int8 = {f"{name}.weight" for name, _ in model.linears() if name not in self.kept}
        matrices = {
            f"{model.family.module(layer, name)}.weight": (layer, name)
            for layer in range(model.geometry.layers)
            for name in model.stored
        }
        plan: dict[str, CheckpointTensor] = {}
        for name, tensor in float_tensors(model).items():
            plan |= self._int8_tensors(model, tensor.planned.shape, *matrices[name]) if name in int8 else {name: tensor}
        return plan

    def config(self, model: Model) -> dict:
        ignore = [*model.float_linears(), *map(_anywhere, self.kept)]
        return {**model.checkpoint.config, "quantization_config": quantization_config(self.scheme, ignore)}

    def _int8_tensors(self, model: Model, shape: tuple[int, ...], layer: int, name: str) -> dict[str, CheckpointTensor]:
        """The tensors of one matrix. shape: (out, in); name: within the layer."""
        full, roles = model.family.module(layer, name), model.stored[name]

        def weight(_: SmoothedLayer, quantized: QuantizedLayer | None) -> Tensor:
            return model.join(name, {role: linear.weight for role, linear in _linears(quantized, roles)})

        def weight_scale(_: SmoothedLayer, quantized: QuantizedLayer | None) -> Tensor:
            return model.join(name, {role: linear.weight_scale for role, linear in _linears(quantized, roles)})[:, None]

        def input_scale(_: SmoothedLayer, quantized: QuantizedLayer | None) -> Tensor:
            scale = _linears(quantized, roles)[0][1].input_scale  # one input, one scale
            assert scale is not None  # `check` has seen to it
            return scale.reshape(1)

        found = {
            f"{full}.weight": CheckpointTensor(Planned(shape, torch.int8), layer, weight),
            f"{full}.weight_scale": CheckpointTensor(Planned((shape[0], 1), torch.float32), layer, weight_scale),
        }
        if self.scheme.activations.static:
            found[f"{full}.input_scale"] = CheckpointTensor(Planned((1,), torch.float32), layer, input_scale)
        return found


def _linears(quantized: QuantizedLayer | None, roles: Sequence[str]) -> list[tuple[str, QuantizedLinear]]:
    assert quantized is not None  # the scheme's weights are
    return [(role, quantized.linears[role]) for role in roles]


def _anywhere(name: str) -> str:
    """A linear's name for `ignore`; an expert's whatever its MLP is called, since transformers renames Mixtral's."""
    layer, experts, rest = name.partition(".experts.")
    return f"re:^{re.escape(layer.rpartition('.')[0])}\\.[^.]+\\.experts\\.{re.escape(rest)}$" if experts else name


def quantization_config(scheme: Scheme, ignore: list[str]) -> dict:
    """The `quantization_config` of config.json. ignore: linears that stay float."""
    dynamic = not scheme.activations.static
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
