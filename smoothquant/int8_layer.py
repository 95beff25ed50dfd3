"""Layers of somebody's INT8 folder, as the decoder runs them: matrices, scales and norms are the folder's own."""

from __future__ import annotations

from torch import Tensor

from smoothquant.int8_model import Int8Model
from smoothquant.layers import W8A8Layer


def int8_layer(int8: Int8Model, index: int) -> W8A8Layer:
    """One layer of a folder, which computes with `quantization.w8a8_linear`. Nothing is quantized again.

    A pre_quant_scale multiplies the input of a linear; its reciprocal is the smoother of the layer. Raises
    CheckpointError for tensors that are not finite, and for scales that are no steps.
    """
    model, stored = int8.model, int8.float_part(index)
    weights: dict[str, Tensor] = {}
    weight_scales: dict[str, Tensor] = {}
    input_scales: dict[str, Tensor] = {}
    smoothers: dict[str, Tensor] = {}
    for name, roles in model.stored.items():
        if roles[0] in stored.weights:
            continue
        linear = int8.linear(model.family.module(index, name))
        weights |= model.split(name, linear.weight)
        weight_scales |= model.split(name, linear.weight_scale)
        if linear.input_scale is not None:
            input_scales |= dict.fromkeys(roles, linear.input_scale)
        if linear.pre_quant_scale is not None:
            smoothers |= dict.fromkeys(roles, 1 / linear.pre_quant_scale)
    return W8A8Layer(
        index=index,
        weights=weights,
        weight_scales=weight_scales,
        biases=stored.biases,
        norms=stored.norms,
        activations=int8.scheme.activations,
        input_scales=input_scales,
        float_weights=stored.weights,
        smoothers=smoothers,
    )
