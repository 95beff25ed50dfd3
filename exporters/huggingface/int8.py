"""INT8 checkpoints: the plan of their tensors, in either dialect of `exporters.huggingface.dialects`.

<linear>.weight, .weight_scale, .input_scale    as the dialect has them
everything else                                 as in the float checkpoint, smoothing folded into the norms
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from exporters.export import Source, check_static
from exporters.huggingface.dialects import Dialect
from exporters.huggingface.tensors import CheckpointTensor, CheckpointWriter, LayerTensorContent, float_tensors
from smoothquant.artifacts.safetensors_files import Planned
from smoothquant.artifacts.shards import MAX_SHARD
from smoothquant.errors import UserError
from smoothquant.int8_checkpoint import BIAS, INPUT_SCALE, WEIGHT, WEIGHT_SCALE
from smoothquant.model import Model
from smoothquant.scheme import Scheme
from smoothquant.stream import QuantizedLayer, QuantizedLinear, SmoothedLayer, WeightRows


class Int8Writer(CheckpointWriter):
    """Writes an INT8 checkpoint to the folder `out`. scheme: int8 weights per output channel, float cache, head and
    embedding.

    dtype: of what stays float; None keeps each tensor's own.
    """

    dialect: Dialect

    def __init__(
        self, out: str | Path, scheme: Scheme, dtype: torch.dtype | None = None, max_shard: int = MAX_SHARD
    ) -> None:
        super().__init__(out, max_shard)
        if not self.dialect.holds(scheme):
            raise UserError(
                f"{out}: {scheme.weights.form} weights, {scheme.activations.form} activations, a KV cache in "
                f"{scheme.kv_cache.dtype}, a head in {scheme.head.dtype}, an embedding in {scheme.embedding.dtype}",
                expected="per-channel weights; cache, head and embedding in float"
                + (", per-tensor activations" if self.dialect.static else ""),
            )
        self.scheme, self.kept, self.dtype = scheme, scheme.float_linears, dtype
        self.schemes = (scheme,)
        self.options: Mapping = {}

    def check(self, source: Source) -> None:
        super().check(source)
        if self.scheme.activations.static:
            check_static(source, self.out, always=self.dialect.static)

    def plan(self, model: Model) -> dict[str, CheckpointTensor]:
        int8 = {name + WEIGHT for name, _ in model.linears() if name not in self.kept}
        matrices = {
            model.family.module(layer, name) + WEIGHT: (layer, name)
            for layer in range(model.geometry.layers)
            for name in model.stored
        }
        plan: dict[str, CheckpointTensor] = {}
        for name, tensor in float_tensors(model, self.dtype).items():
            weight = name.removesuffix(BIAS) + WEIGHT if name.endswith(BIAS) else name
            if weight not in int8:
                plan[name] = tensor
            elif name == weight:
                plan |= self._int8_tensors(model, tensor.planned.shape, *matrices[weight])
            else:
                plan[name] = _bias(model, tensor.planned, *matrices[weight])
        return plan

    def config(self, model: Model) -> dict:
        config = dict(model.checkpoint.config)
        if self.dtype:
            config["dtype"] = config["torch_dtype"] = str(self.dtype).removeprefix("torch.")
        return config

    def says(self, model: Model) -> dict[str, dict]:
        return self.dialect.says(self.config(model), self.scheme, [*model.float_linears(), *self.kept])

    def _int8_tensors(self, model: Model, shape: tuple[int, ...], layer: int, name: str) -> dict[str, CheckpointTensor]:
        """The tensors of one matrix. shape: (out, in); name: within the layer."""
        full, roles = model.family.module(layer, name), model.stored[name]

        def weight_scale(_: SmoothedLayer, quantized: QuantizedLayer | None) -> Tensor:
            return model.join(name, {role: linear.weight_scale for role, linear in _linears(quantized, roles)})

        def input_scale(_: SmoothedLayer, quantized: QuantizedLayer | None) -> Tensor:
            scale = _linears(quantized, roles)[0][1].input_scale  # one input, one scale
            assert scale is not None  # `check` has seen to it
            return scale

        def int8(rows: WeightRows) -> Tensor:
            return rows.int8[self.scheme.weights]

        contents = {full + WEIGHT_SCALE: weight_scale, full + INPUT_SCALE: input_scale}
        return {
            tensor: CheckpointTensor(planned, layer, self._shaped(tensor, contents[tensor]))
            if tensor in contents
            else CheckpointTensor(planned, layer, rows=int8)
            for tensor, planned in self.dialect.plan(full, shape, self.scheme).items()
        }

    def _shaped(self, name: str, content: LayerTensorContent) -> LayerTensorContent:
        return lambda layer, quantized: self.dialect.shaped(name, content(layer, quantized))


def _bias(model: Model, planned: Planned, layer: int, name: str) -> CheckpointTensor:
    """The bias of a quantized matrix. name: within the layer."""
    roles = model.stored[name]

    def content(_: SmoothedLayer, quantized: QuantizedLayer | None) -> Tensor:
        biases = {role: linear.bias for role, linear in _linears(quantized, roles)}
        return model.join(name, {role: bias for role, bias in biases.items() if bias is not None})

    return CheckpointTensor(planned, layer, content)


def _linears(quantized: QuantizedLayer | None, roles: Sequence[str]) -> list[tuple[str, QuantizedLinear]]:
    assert quantized is not None  # the scheme's weights are
    return [(role, quantized.linears[role]) for role in roles]
