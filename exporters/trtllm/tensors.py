"""The tensors of one layer, by TensorRT-LLM's names, of the whole model: the ranks' parts are cut out of them.

                          SmoothQuant plugins                           ModelOpt's form
    attention.qkv         weight, per_channel_scale, act_scale, bias    weight, weights_scaling_factor,
    attention.dense       the same, smoother                              activation_scaling_factor,
    mlp.fc                as qkv                                          prequant_scaling_factor, bias
    mlp.gate              as qkv; gated MLPs only                         of each linear
    mlp.proj              as dense
    attention, mlp        quantization_scaling_factor (static)
    attention             kv_cache_scaling_factor (INT8 KV cache)       the same
    input_layernorm       weight, bias, scale_to_int                    weight, bias
    post_layernorm        the same; mlp_layernorm where the branches are parallel

fc is what the activation function follows: gate_proj of a Llama, whose up_proj is `gate`; fc1 of an OPT. Weights are
int8 (out, in), rows of q, k and v one after another; scales float32. The engine divides the input of dense and proj by
`smoother`, and multiplies every input by `prequant_scaling_factor`; ones where smoothing is folded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from exporters.trtllm import quantities
from exporters.trtllm.modes import Mode
from exporters.trtllm.sharding import Sharded, divided, repeated_heads, whole
from smoothquant.model import Model
from smoothquant.stream import QuantizedLayer, QuantizedLinear

Named = Iterator[tuple[str, Sharded]]


@dataclass(frozen=True)
class Matrix:
    """A linear of the engine. name: within a layer; roles: ours that it consists of; column: whether its rows are
    divided among the ranks, else its columns are."""

    name: str
    roles: tuple[str, ...]
    column: bool = True

    @property
    def module(self) -> str:
        return self.name.partition(".")[0]


def matrices(gated: bool) -> tuple[Matrix, ...]:
    """The linears of a layer."""
    mlp = (Matrix("mlp.fc", ("gate",)), Matrix("mlp.gate", ("up",))) if gated else (Matrix("mlp.fc", ("up",)),)
    return (
        Matrix("attention.qkv", ("q", "k", "v")),
        Matrix("attention.dense", ("o",), column=False),
        *mlp,
        Matrix("mlp.proj", ("down",), column=False),
    )


@dataclass(frozen=True)
class LayerTensors:
    """Makes the tensors of a model's layers. dtype: of biases and norms; tp: number of ranks."""

    model: Model
    mode: Mode
    dtype: torch.dtype
    tp: int

    def of(self, layer: QuantizedLayer, output_absmax: Mapping[str, Tensor], cache_scale: Tensor | None) -> Named:
        """Names within the layer, and tensors. output_absmax: by role (out,), of the smoothed linears; cache_scale: of
        keys and values alike, scalar; None for a float KV cache."""
        for matrix in matrices(self.model.family.gated):
            linears = [layer.linears[role] for role in matrix.roles]
            yield f"{matrix.name}.weight", self._weights(matrix, linears)
            write = self._for_plugin if self.mode.plugin else self._for_modelopt
            yield from write(matrix, linears, output_absmax)
            biases = [linear.bias for linear in linears if linear.bias is not None]
            if biases:
                biases = [bias.to(self.dtype) for bias in biases]
                yield f"{matrix.name}.bias", self._rows(matrix, biases) if matrix.column else whole(biases[0])
        if cache_scale is not None:
            yield "attention.kv_cache_scaling_factor", whole(cache_scale.reshape(1))
        for role, norm in layer.norms.items():
            name = self._norm(role)
            yield f"{name}.weight", whole(norm.weight.to(self.dtype))
            if norm.bias is not None:
                yield f"{name}.bias", whole(norm.bias.to(self.dtype))
            if self.mode.plugin:
                reader = layer.linears[self._fed_by(role)]
                yield f"{name}.scale_to_int", whole(quantities.scale_to_int(self._static(reader)))

    def _for_plugin(self, matrix: Matrix, linears: list[QuantizedLinear], output_absmax: Mapping[str, Tensor]) -> Named:
        scales = [linear.weight_scale for linear in linears]
        input_scale = self._static(linears[0])
        if input_scale is not None:
            reach = torch.stack([output_absmax[role].amax() for role in matrix.roles])
            act_scale = quantities.act_scale(reach)
            scales = [quantities.static_channel_scale(scale, input_scale, act_scale) for scale in scales]
            yield f"{matrix.name}.act_scale", whole(act_scale.reshape(1, 1))
        if self.mode.weights == "per-tensor" and len(linears) == 1:
            yield f"{matrix.name}.per_channel_scale", whole(scales[0][:1].reshape(1, 1))
        elif matrix.column:
            rows = self._rows(matrix, scales)
            yield f"{matrix.name}.per_channel_scale", divided(1, *(part[None] for part in rows.parts))
        else:
            yield f"{matrix.name}.per_channel_scale", whole(scales[0][None])
        if not matrix.column:
            smoother = linears[0].smoother
            ones = torch.ones(linears[0].weight.shape[1])
            yield f"{matrix.name}.smoother", divided(1, (ones if smoother is None else smoother)[None])
            if input_scale is not None:
                yield f"{matrix.module}.quantization_scaling_factor", whole(quantities.scale_to_int(input_scale))

    def _for_modelopt(self, matrix: Matrix, linears: list[QuantizedLinear], _: Mapping[str, Tensor]) -> Named:
        scales = [linear.weight_scale for linear in linears]
        yield f"{matrix.name}.weights_scaling_factor", self._rows(matrix, scales) if matrix.column else whole(scales[0])
        input_scale = self._static(linears[0])
        assert input_scale is not None  # this form is static
        yield f"{matrix.name}.activation_scaling_factor", whole(input_scale.reshape(1))
        smoother = linears[0].smoother
        factor = (torch.ones(linears[0].weight.shape[1]) if smoother is None else 1 / smoother).to(self.dtype)
        yield f"{matrix.name}.prequant_scaling_factor", whole(factor) if matrix.column else divided(0, factor)

    def _weights(self, matrix: Matrix, linears: list[QuantizedLinear]) -> Sharded:
        weights = [linear.weight for linear in linears]
        return self._rows(matrix, weights) if matrix.column else divided(1, weights[0])

    def _rows(self, matrix: Matrix, parts: list[Tensor]) -> Sharded:
        """What there is one of for each row, divided; kv heads repeated where there are fewer than ranks."""
        heads = self.model.geometry.kv_heads
        pairs = zip(matrix.roles, parts, strict=True)
        return divided(
            0, *(repeated_heads(part, heads, self.tp) if role in ("k", "v") else part for role, part in pairs)
        )

    def _static(self, linear: QuantizedLinear) -> Tensor | None:
        return linear.input_scale if self.mode.static else None

    def _norm(self, role: str) -> str:
        if role == "attention":
            return "input_layernorm"
        return "mlp_layernorm" if self.model.family.parallel else "post_layernorm"

    def _fed_by(self, norm: str) -> str:
        """A linear that reads the output of this norm."""
        return next(group.linears[0] for group in self.model.groups if group.source == norm)
