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
    model, scheme = int8.model, int8.scheme
    kept = set(scheme.float_linears)
    weights: dict[str, Tensor] = {}
    weight_scales: dict[str, Tensor] = {}
    input_scales: dict[str, Tensor] = {}
    smoothers: dict[str, Tensor] = {}
    float_weights: dict[str, Tensor] = {}
    biases: dict[str, Tensor] = {}
    for name, roles in model.stored.items():
        full = model.family.module(index, name)
        if full in kept or full in model.float_linears():
            float_weights |= model.split(name, model.read(f"{full}.weight"))
        else:
            linear = int8.linear(full)
            weights |= model.split(name, linear.weight)
            weight_scales |= model.split(name, linear.weight_scale)
            if linear.input_scale is not None:
                input_scales |= dict.fromkeys(roles, linear.input_scale)
            if linear.pre_quant_scale is not None:
                smoothers |= dict.fromkeys(roles, 1 / linear.pre_quant_scale)
        if model.family.has_bias(roles[0], model.geometry):
            biases |= model.split(name, model.read(f"{full}.bias"))
    norms = {role: model.norm_at(model.norm(index, role)) for role in model.family.norms}
    return W8A8Layer(
        index=index,
        weights=weights,
        weight_scales=weight_scales,
        biases=biases,
        norms=norms,
        activations=scheme.activations,
        input_scales=input_scales,
        float_weights=float_weights,
        smoothers=smoothers,
    )
