"""Layers that the decoder runs, in float and in W8A8."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from smoothquant import kv_cache
from smoothquant.model import Model
from smoothquant.norms import Norm
from smoothquant.quantization import w8a8_linear
from smoothquant.scheme import Precision

ROW_PARALLEL = ("o", "down")  # linears whose input is divided among the ranks of tensor parallelism
Listener = Callable[[str, Tensor, Tensor], None]  # (role, input, output) of a linear


class Layer(Protocol):
    """The protocol of a layer, which the decoder uses. norms: the norms by role."""

    @property
    def index(self) -> int: ...

    @property
    def norms(self) -> Mapping[str, Norm]: ...

    def linear(self, role: str, x: Tensor) -> Tensor:
        """The output of a linear with its bias, (..., out). x: (..., in)."""
        ...

    def cached(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The rotated keys and values as queries read them: unchanged, unless the layer has an 8-bit cache."""
        ...


@dataclass(frozen=True)
class FloatLayer:
    """A layer with float weights, computed in the dtype of its input.

    weights, biases, norms: the tensors by role. listen: a function that is called with (role, input, output) of every
    linear.
    """

    index: int
    weights: Mapping[str, Tensor]
    biases: Mapping[str, Tensor]
    norms: Mapping[str, Norm]
    listen: Listener | None = None

    def to(self, device: str, dtype: torch.dtype | None = None) -> FloatLayer:
        """The same layer on a device, with weights and biases in `dtype` if one is given."""
        weights, biases = _moved(self.weights, device, dtype), _moved(self.biases, device, dtype)
        return FloatLayer(self.index, weights, biases, _norms(self.norms, device), self.listen)

    def linear(self, role: str, x: Tensor) -> Tensor:
        y = float_linear(x, self.weights[role], self.biases.get(role))
        if self.listen:
            self.listen(role, x, y)
        return y

    def cached(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return keys, values


@dataclass(frozen=True)
class W8A8Layer:
    """A quantized layer, computed with `quantization.w8a8_linear` in the dtype of its input.

    weights: int8 (out, in) by role. weight_scales: (out,) by role. activations: the precision of inputs. input_scales:
    scalars by role, for static activations. float_weights: the weights of linears that stay in float. smoothers: the
    divisors of inputs by role, (in,). cache_scales: the scales of keys and values in an 8-bit KV cache; None for a
    float cache. ranks: the number of ranks of tensor parallelism. Each rank has its own scales per token for its part
    of the inputs of o and down.
    """

    index: int
    weights: Mapping[str, Tensor]
    weight_scales: Mapping[str, Tensor]
    biases: Mapping[str, Tensor]
    norms: Mapping[str, Norm]
    activations: Precision
    input_scales: Mapping[str, Tensor]
    float_weights: Mapping[str, Tensor] = field(default_factory=dict)
    smoothers: Mapping[str, Tensor] = field(default_factory=dict)
    cache_scales: kv_cache.Scales | None = None
    ranks: int = 1
    listen: Listener | None = None

    def to(self, device: str) -> W8A8Layer:
        """The same layer on a device."""
        return W8A8Layer(
            index=self.index,
            weights=_moved(self.weights, device),
            weight_scales=_moved(self.weight_scales, device),
            biases=_moved(self.biases, device),
            norms=_norms(self.norms, device),
            activations=self.activations,
            input_scales=_moved(self.input_scales, device),
            float_weights=_moved(self.float_weights, device),
            smoothers=_moved(self.smoothers, device),
            cache_scales=self.cache_scales,
            ranks=self.ranks,
            listen=self.listen,
        )

    def linear(self, role: str, x: Tensor) -> Tensor:
        bias = self.biases.get(role)
        smoothed = x / self.smoothers[role].to(x.dtype) if role in self.smoothers else x
        if role in self.float_weights:
            y = float_linear(smoothed, self.float_weights[role], bias)
        else:
            y = self._quantized(role, smoothed)
            y = y if bias is None else y + bias.to(y.dtype)
        if self.listen:
            self.listen(role, x, y)
        return y

    def _quantized(self, role: str, x: Tensor) -> Tensor:
        weight, scale = self.weights[role], self.weight_scales[role]
        if self.activations.static or role not in ROW_PARALLEL:
            return w8a8_linear(x, weight, scale, self.activations, self.input_scales.get(role))
        parts = zip(x.chunk(self.ranks, dim=-1), weight.chunk(self.ranks, dim=1), strict=True)
        products = [w8a8_linear(part, columns, scale, self.activations) for part, columns in parts]
        return torch.stack(products).sum(dim=0) if len(products) > 1 else products[0]

    def cached(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if self.cache_scales is None:
            return keys, values
        key_scale, value_scale = self.cache_scales
        return kv_cache.cached(keys, key_scale), kv_cache.cached(values, value_scale)


Stored = FloatLayer | W8A8Layer  # a layer as a folder holds it


def float_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The output of a float linear, in the dtype of x."""
    return functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def _moved(tensors: Mapping[str, Tensor], device: str, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    return {role: tensor.to(device, dtype, non_blocking=tensor.is_pinned()) for role, tensor in tensors.items()}


def _norms(norms: Mapping[str, Norm], device: str) -> dict[str, Norm]:
    return {role: norm.to(device) for role, norm in norms.items()}


def pinned(layer: Stored) -> Stored:
    """The same layer with its weights in pinned memory, out of which a GPU copies while the processor goes on."""
    return replace(layer, weights={role: weight.pin_memory() for role, weight in layer.weights.items()})


def float_layer(
    model: Model,
    index: int,
    dtype: torch.dtype | None = None,
    listen: Listener | None = None,
    among: Collection[str] | None = None,
) -> FloatLayer:
    """One layer, read from a checkpoint. dtype: the dtype of its linears; None keeps the dtype on disk. among: the
    module names of the matrices to read, where the others are not float; None for all."""
    weights: dict[str, Tensor] = {}
    biases: dict[str, Tensor] = {}
    for name, roles in model.stored.items():
        full = model.family.module(index, name)
        if among is None or full in among:
            weights |= model.split(name, model.read(f"{full}.weight").to(dtype=dtype))
        if model.family.has_bias(roles[0], model.geometry):
            biases |= model.split(name, model.read(f"{full}.bias").to(dtype=dtype))
    norms = {role: model.norm_at(model.norm(index, role)) for role in model.family.norms}
    return FloatLayer(index, weights, biases, norms, listen)
