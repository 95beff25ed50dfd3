"""Layers that the decoder runs, in float and in W8A8."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from smoothquant import kv_cache
from smoothquant.model import Model
from smoothquant.norms import Norm
from smoothquant.quantization import absmax, w8a8_linear
from smoothquant.scheme import Precision
from smoothquant.slices import Part, StoredWeights, joined

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

    weights, biases, norms: the tensors by role; weights may be `StoredWeights`, of which a slice is in memory.
    listen: a function that is called with (role, input, output) of every linear. measured: what `column_absmax` found.
    """

    index: int
    weights: Mapping[str, Tensor]
    biases: Mapping[str, Tensor]
    norms: Mapping[str, Norm]
    listen: Listener | None = None
    measured: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def to(self, device: str, dtype: torch.dtype | None = None) -> FloatLayer:
        """The same layer on a device, with weights and biases in `dtype` if one is given."""
        biases = _moved(self.biases, device, dtype)
        weights: Mapping[str, Tensor]
        if isinstance(self.weights, StoredWeights):
            weights = self.weights.to(device, dtype)
        else:
            weights = _moved(self.weights, device, dtype)
        return FloatLayer(self.index, weights, biases, _norms(self.norms, device), self.listen)

    def rows(self, role: str) -> int:
        """The number of rows of a weight."""
        return self.weights.rows(role) if isinstance(self.weights, StoredWeights) else len(self.weights[role])

    def parts(self, role: str) -> Iterator[Part]:
        """A weight, some of its rows at a time; all of them where the weights are in memory."""
        if isinstance(self.weights, StoredWeights):
            return self.weights.parts(role)
        return iter([(slice(0, self.rows(role)), self.weights[role])])

    def column_absmax(self, role: str) -> Tensor:
        """The largest magnitude in each column of a weight, float32 (in,). It is found once."""
        if role not in self.measured:
            for _ in self.measuring(role):
                pass
        return self.measured[role]

    def measuring(self, role: str) -> Iterator[Part]:
        """The same as `parts`, for who uses the weight and wants `column_absmax` afterwards: it is read once."""
        found: Tensor | None = None
        for rows, part in self.parts(role):
            yield rows, part
            largest = absmax(part, dim=0).float()
            found = largest if found is None else torch.maximum(found, largest)
        assert found is not None  # a weight has rows
        self.measured[role] = found

    def linear(self, role: str, x: Tensor) -> Tensor:
        y = sliced_linear(x, self.rows(role), self.parts(role), self.biases.get(role))
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


def sliced_linear(x: Tensor, rows: int, weight: Iterable[Part], bias: Tensor | None) -> Tensor:
    """The output of a float linear, (..., rows), in the dtype of x. weight: some of its rows at a time."""
    parts = ((part, float_linear(x, found, None if bias is None else bias[part])) for part, found in weight)
    return joined(rows, parts)


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
    numbers: int | None = None,
) -> FloatLayer:
    """One layer, read from a checkpoint. dtype: the dtype of its linears; None keeps the dtype on disk. among: the
    module names of the matrices to read, where the others are not float; None for all. numbers: how many numbers of a
    matrix are in memory at a time, whenever it is used; None to read all matrices now."""
    weights: dict[str, Tensor] = {}
    biases: dict[str, Tensor] = {}
    for name, roles in model.stored.items():
        full = model.family.module(index, name)
        if numbers is None and (among is None or full in among):
            weights |= model.split(name, model.read(f"{full}.weight").to(dtype=dtype))
        if model.family.has_bias(roles[0], model.geometry):
            biases |= model.split(name, model.read(f"{full}.bias").to(dtype=dtype))
    norms = {role: model.norm_at(model.norm(index, role)) for role in model.family.norms}
    stored = weights if numbers is None else StoredWeights(model, index, numbers, dtype)
    return FloatLayer(index, stored, biases, norms, listen)
