"""Every tensor of a checkpoint, planned once: its name, a rank's shape, its dtype and its content.

                          SmoothQuant's plugins                         without plugins
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

With X and Y the largest magnitudes that calibration saw at a linear's (smoothed) input and at its output, r a weight
row's largest magnitude, input_scale = X / 127 and weight_scale = r / 127, the plugins are given

    per token    per_channel_scale = r / 127               y = (x8 . w8) * token_scale * per_channel_scale
    static       scale_to_int      = 127 / X               multiplies the activation before it is rounded
                 act_scale         = Y / 127
                 per_channel_scale = X r / (127 Y)         y = (x8 . w8) * act_scale * per_channel_scale

Y cancels: it is what an INT8 output would be scaled by. Format: TensorRT-LLM's llama converter, of which these are the
formulas in float32 (its own run in float16, where rows below 0.002 overflow).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from exporters.trtllm.modes import Mode
from exporters.trtllm.sharding import Sharded, divided, repeated_heads, whole
from smoothquant.model import Model
from smoothquant.quantization import QMAX
from smoothquant.stream import QuantizedLayer, QuantizedLinear, WeightRows


@dataclass(frozen=True)
class LayerContent:
    """What the tensors of a layer are made of. output_absmax: role -> (out,), of the smoothed linears; cache_scale: of
    keys and values alike, which share it in this format, scalar; None where it is not known."""

    layer: QuantizedLayer
    output_absmax: Mapping[str, Tensor]
    cache_scale: Tensor | None


@dataclass(frozen=True)
class LayerTensor:
    """A tensor of a layer. name: within the layer; shape: of one rank's part; content: the unsharded tensor; None for
    a weight, of which `LayerTensors.of_rows` gives some rows at a time."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    content: Callable[[LayerContent], Sharded] | None


@dataclass(frozen=True)
class RankRows:
    """Some rows of a weight of one rank. name: within the layer. row: the first."""

    name: str
    rank: int
    row: int
    content: Tensor


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

    def of(self, layer: QuantizedLayer) -> list[QuantizedLinear]:
        """Its linears."""
        return [layer.linears[role] for role in self.roles]

    def tensor(
        self,
        kind: str,
        shape: tuple[int, ...],
        content: Callable[[Matrix, LayerContent], Sharded],
        dtype: torch.dtype = torch.float32,
    ) -> LayerTensor:
        """One of its tensors. kind: its name in the linear; shape: of one rank's part."""
        return LayerTensor(f"{self.name}.{kind}", shape, dtype, partial(content, self))


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
    """Plans the tensors of a model's layers. dtype: of biases and norms; tp: number of ranks."""

    model: Model
    mode: Mode
    dtype: torch.dtype
    tp: int

    def planned(self) -> Iterator[LayerTensor]:
        """The tensors of any layer, in the order on disk."""
        for matrix in matrices(self.model.family.gated):
            yield from self._linear(matrix)
        if self.mode.cache.quantized:
            yield LayerTensor("attention.kv_cache_scaling_factor", (1,), torch.float32, _cache_scale)
        for role in self.model.family.norms:
            yield from self._norm(role)

    def of_rows(self, rows: WeightRows) -> Iterator[RankRows]:
        """What each rank of a stage holds of some rows of a linear; its kv heads are repeated where there are fewer
        than ranks."""
        matrix = next(matrix for matrix in matrices(self.model.family.gated) if rows.role in matrix.roles)
        name, int8 = f"{matrix.name}.weight", rows.int8[self.mode.scheme.weights]
        if not matrix.column:
            for rank, columns in enumerate(int8.chunk(self.tp, dim=1)):
                yield RankRows(name, rank, rows.rows.start, columns)
            return
        family, geometry = self.model.family, self.model.geometry
        times = {role: self._times(role) for role in matrix.roles}
        each = {role: family.shape(role, geometry)[0] * times[role] // self.tp for role in matrix.roles}
        row = sum(each[role] for role in matrix.roles[: matrix.roles.index(rows.role)])
        for rank in range(self.tp):
            first = rank // times[rows.role] * each[rows.role]
            begin, end = max(first, rows.rows.start), min(first + each[rows.role], rows.rows.stop)
            if begin < end:
                mine = int8[begin - rows.rows.start : end - rows.rows.start]
                yield RankRows(name, rank, row + begin - first, mine)

    def _times(self, role: str) -> int:
        """How many ranks hold the same rows of a linear."""
        return max(1, self.tp // self.model.geometry.kv_heads) if role in ("k", "v") else 1

    def _linear(self, matrix: Matrix) -> Iterator[LayerTensor]:
        family, geometry = self.model.family, self.model.geometry
        rows, columns = self._shape(matrix)
        yield LayerTensor(f"{matrix.name}.weight", (rows, columns), torch.int8, None)
        yield from (self._for_plugin if self.mode.plugin else self._for_tensorrt)(matrix, rows, columns)
        if any(family.has_bias(role, geometry) for role in matrix.roles):
            yield matrix.tensor("bias", (rows,), self._bias, self.dtype)

    def _for_plugin(self, matrix: Matrix, rows: int, columns: int) -> Iterator[LayerTensor]:
        """What SmoothQuant's plugins read beside the weight and the bias. rows, columns: of a rank's part."""
        if self.mode.static:
            yield matrix.tensor("act_scale", (1, 1), lambda *of: whole(_act_scale(*of).reshape(1, 1)))
        one = self.mode.whole and len(matrix.roles) == 1
        yield matrix.tensor("per_channel_scale", (1, 1 if one else rows), self._channel_scale)
        if not matrix.column:
            yield matrix.tensor("smoother", (1, columns), lambda *of: divided(1, _smoother(*of)[None]))
            if self.mode.static:
                name = f"{matrix.module}.quantization_scaling_factor"
                content = partial(lambda *of: whole(scale_to_int(_input_scale(*of))), matrix)
                yield LayerTensor(name, (1,), torch.float32, content)

    def _for_tensorrt(self, matrix: Matrix, rows: int, columns: int) -> Iterator[LayerTensor]:
        """What TensorRT's own Q/DQ layers read beside the weight and the bias. rows, columns: of a rank's part."""
        yield matrix.tensor("weights_scaling_factor", (rows,), self._weight_scale)
        yield matrix.tensor("activation_scaling_factor", (1,), lambda *of: whole(_input_scale(*of).reshape(1)))
        yield matrix.tensor("prequant_scaling_factor", (columns,), self._factor, self.dtype)

    def _norm(self, role: str) -> Iterator[LayerTensor]:
        parallel, hidden = self.model.family.parallel, self.model.geometry.hidden_size
        name = {"attention": "input_layernorm", "mlp": "mlp_layernorm" if parallel else "post_layernorm"}[role]

        def weight(content: LayerContent) -> Sharded:
            return whole(content.layer.norms[role].weight.to(self.dtype))

        def bias(content: LayerContent) -> Sharded:
            found = content.layer.norms[role].bias
            assert found is not None  # a layer norm has one
            return whole(found.to(self.dtype))

        def to_int(content: LayerContent) -> Sharded:
            reader = next(group.linears[0] for group in self.model.groups if group.source == role)
            return whole(scale_to_int(content.layer.linears[reader].input_scale if self.mode.static else None))

        yield LayerTensor(f"{name}.weight", (hidden,), self.dtype, weight)
        if self.model.family.norm == "layer":
            yield LayerTensor(f"{name}.bias", (hidden,), self.dtype, bias)
        if self.mode.plugin:
            yield LayerTensor(f"{name}.scale_to_int", (1,), torch.float32, to_int)

    def _shape(self, matrix: Matrix) -> tuple[int, int]:
        """Rows and columns of a rank's part."""
        family, geometry, tp = self.model.family, self.model.geometry, self.tp
        shapes = {role: family.shape(role, geometry) for role in matrix.roles}
        rows = sum(out * self._times(role) for role, (out, _) in shapes.items())
        columns = shapes[matrix.roles[0]][1]
        return (rows // tp, columns) if matrix.column else (rows, columns // tp)

    def _weight_scale(self, matrix: Matrix, content: LayerContent) -> Sharded:
        scales = [linear.weight_scale for linear in matrix.of(content.layer)]
        return self._rows(matrix, scales) if matrix.column else whole(scales[0])

    def _bias(self, matrix: Matrix, content: LayerContent) -> Sharded:
        biases = [linear.bias.to(self.dtype) for linear in matrix.of(content.layer) if linear.bias is not None]
        return self._rows(matrix, biases) if matrix.column else whole(biases[0])

    def _channel_scale(self, matrix: Matrix, content: LayerContent) -> Sharded:
        scales = [linear.weight_scale for linear in matrix.of(content.layer)]
        if self.mode.static:
            input_scale, reach = _input_scale(matrix, content), _act_scale(matrix, content)
            scales = [static_channel_scale(scale, input_scale, reach) for scale in scales]
        if self.mode.whole and len(scales) == 1:
            return whole(scales[0][:1].reshape(1, 1))
        if not matrix.column:
            return whole(scales[0][None])
        return divided(1, *(part[None] for part in self._rows(matrix, scales).parts))

    def _factor(self, matrix: Matrix, content: LayerContent) -> Sharded:
        factor = (1 / _smoother(matrix, content)).to(self.dtype)
        return whole(factor) if matrix.column else divided(0, factor)

    def _rows(self, matrix: Matrix, parts: list[Tensor]) -> Sharded:
        """What there is one of for each row, divided; kv heads repeated where there are fewer than ranks."""
        heads = self.model.geometry.kv_heads
        pairs = zip(matrix.roles, parts, strict=True)
        return divided(
            0, *(repeated_heads(part, heads, self.tp) if role in ("k", "v") else part for role, part in pairs)
        )


def scale_to_int(input_scale: Tensor | None) -> Tensor:
    """Factor from activations to int8, float32 (1,). input_scale: scalar; None for per-token activations: 1."""
    return torch.ones(1) if input_scale is None else (1 / input_scale).reshape(1)


def act_scale(output_absmax: Tensor) -> Tensor:
    """float32 scalar > 0. output_absmax: (out,), of all linears that are one for the engine."""
    reach = output_absmax.float().amax()
    return torch.where(reach > 0, reach, torch.ones_like(reach)) / QMAX


def static_channel_scale(weight_scale: Tensor, input_scale: Tensor, act_scale: Tensor) -> Tensor:
    """per_channel_scale of static activations. weight_scale: (out,); input_scale, act_scale: scalars; returns (out,)
    float32. Its product with act_scale is input_scale * weight_scale."""
    return (weight_scale.double() * input_scale.double() / act_scale.double()).float()


def _act_scale(matrix: Matrix, content: LayerContent) -> Tensor:
    return act_scale(torch.stack([content.output_absmax[role].amax() for role in matrix.roles]))


def _input_scale(matrix: Matrix, content: LayerContent) -> Tensor:
    scale = matrix.of(content.layer)[0].input_scale  # one input, one scale
    assert scale is not None  # the writer's `check` has seen to it
    return scale


def _smoother(matrix: Matrix, content: LayerContent) -> Tensor:
    """What the engine divides the input by, float32 (in,)."""
    linear = matrix.of(content.layer)[0]
    return torch.ones(linear.weight.shape[1]) if linear.smoother is None else linear.smoother


def _cache_scale(content: LayerContent) -> Sharded:
    assert content.cache_scale is not None  # the writer's `check` has seen to it
    return whole(content.cache_scale.reshape(1))
