"""INT8 quantization: symmetric, weights per output channel, activations per token or per tensor.

    weight_scale[o] = max_j |W[o, j]| / 127          Wq = clamp(round(W / weight_scale), -127, 127)
    token_amax[t]   = max(max_j |x[t, j]|, EPS)      xq = round((x / token_amax) / (1/127))
    y[t, o]         = (sum_j xq[t, j] * Wq[o, j]) * (1/127) * token_amax[t] * weight_scale[o]

Rounding is half to even, arithmetic is float32 (or the wider dtype of the input), zero points are 0 and no
scale is ever 0. Tokens are normalised by their maximum *before* they are divided by the constant 1/127: this
is the order of operations that ONNX Runtime and TensorRT compile to integer kernels (`exporters/onnx`), so
that every engine rounds the same numbers. The static form replaces token_amax by the constant 127 * input_scale.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from smoothquant.machine import cpu_flags
from smoothquant.scheme import WEIGHTS, Precision

QMAX = 127
EPS = 1e-12  # floor of a token's maximum: an all-zero token quantizes to zeros
AT_ONCE = 1 << 18  # numbers of a weight that are rounded at once: they stay in a core's cache
INT8_FLAGS = {"amx_int8", "avx512_vnni", "avx_vnni"}  # with these PyTorch has a quick product of int8 matrices
_INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # the integer dtype of so many bytes
_TINY = torch.finfo(torch.float32).tiny  # smallest normal float32: the scale of an all-zero output channel


def weight_scale(weight_absmax: Tensor) -> Tensor:
    """The scale of each output channel, float32 (out,), all > 0. weight_absmax: float (out,)."""
    return (weight_absmax.float() / QMAX).clamp_min(_TINY)


def quantize_weight(weight: Tensor, precision: Precision = WEIGHTS["per-channel"]) -> tuple[Tensor, Tensor]:
    """The weight as int8 (out, in) in [-127, 127], and its weight_scale float32 (out,). weight: (out, in) float.

    precision: the precision of a scheme's weights or head. With one scale per tensor every channel has the largest.
    """
    weight = weight.float()
    scale = row_scales(absmax(weight, dim=1), precision)
    return quantize_rows(weight, scale), scale


def row_scales(weight_absmax: Tensor, precision: Precision) -> Tensor:
    """The weight_scale of a whole weight, float32 (out,). weight_absmax: the largest magnitude of each row, (out,)."""
    scale = weight_scale(weight_absmax)
    if precision == WEIGHTS["per-tensor"]:
        return scale.amax().repeat(len(scale))
    if precision != WEIGHTS["per-channel"]:
        raise ValueError(f"weights as {precision}")
    return scale


def quantize_rows(weight: Tensor, weight_scale: Tensor) -> Tensor:
    """Rows of a weight as int8 (rows, in) in [-127, 127]. weight: float32 (rows, in). weight_scale: float32 (rows,)."""
    quantized = torch.empty_like(weight, dtype=torch.int8)
    rows = max(1, AT_ONCE // weight.shape[1])
    steps = weight_scale[:, None].split(rows)
    for part, found, step in zip(quantized.split(rows), weight.split(rows), steps, strict=True):
        part.copy_((found / step).round_().clamp_(-QMAX, QMAX))
    return quantized


def absmax(x: Tensor, dim: int) -> Tensor:
    """The largest magnitude along a dimension, in the dtype of x. NaN and Inf are kept.

    Along the last dimension, it comes from the maximum and the minimum. Along any other, the bits are compared as
    integers, which is ten times faster: without the sign they have the order of the floats, and NaN is above all.
    """
    if dim in (-1, x.dim() - 1):
        return torch.maximum(x.amax(dim), -x.amin(dim))
    return x.abs().view(_INTEGER[x.dtype.itemsize]).amax(dim).view(x.dtype)


def is_finite(x: Tensor) -> bool:
    """Whether x has no NaN or Inf. One-byte dtypes have neither, since their numbers were quantized."""
    if x.dtype.itemsize == 1 or not x.numel():
        return True
    ends = torch.stack(torch.aminmax(x))  # NaN goes through both; twenty times as fast as looking at every number
    return bool(ends.isfinite().all())


def quantize_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize dynamically, per token. x: (..., in) float32 or float64.

    Returns integer values (..., in) in x's dtype and token_scale (..., 1) = token_amax / 127.
    """
    token_amax = absmax(x, dim=-1)[..., None].clamp_min(EPS)
    return _round_((x / token_amax).div_(_step(x))), token_amax * _step(x)


def quantize_tensor(x: Tensor, input_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize statically, per tensor. x: (..., in) float32 or float64; input_scale: scalar > 0.

    Returns integer values (..., in) in x's dtype and the scale.
    """
    scale = input_scale.to(x.dtype)
    return _round_(x / scale), scale


def quantize_input(x: Tensor, precision: Precision, input_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The integer values (..., in) and the scale of an input.

    precision: the precision of a scheme's activations. input_scale: a scalar, for static activations.
    """
    if not precision.static:
        return quantize_tokens(x)
    assert input_scale is not None
    return quantize_tensor(x, input_scale)


def w8a8_linear(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    activations: Precision,
    input_scale: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """The output of a quantized linear, (..., out), in the dtype of x. In float64 it is exact.

    x: float32 or float64 (..., in). weight: int8 (out, in). weight_scale: (out,). activations: the precision of x.
    input_scale: a scalar, for static activations. bias: (out,).
    """
    quantized, scale = quantize_input(x, activations, input_scale)
    y = _product(quantized, weight).mul_(scale).mul_(weight_scale.to(x.dtype))
    return y if bias is None else y + bias.to(x.dtype)


def input_scale(smoothed_absmax: Tensor) -> Tensor:
    """The static scale of activations, a float32 scalar > 0. smoothed_absmax: max |x_j / s_j|, (in,)."""
    return (smoothed_absmax.float().amax() / QMAX).clamp_min(_TINY)


def _product(integers: Tensor, weight: Tensor) -> Tensor:
    """The sums of an integer product, (..., out), in the dtype of `integers`.

    integers: numbers in the range of int8, in a float dtype, (..., in). weight: int8 (out, in).
    In float32, sums beyond 2^24 are rounded on the way. A processor with instructions for int8 does not round them, and
    is four times as quick. (It is not used for a single column, where PyTorch 2.13 is wrong.)
    """
    here = integers.dtype == torch.float32 and integers.device.type == "cpu"
    if here and weight.shape[1] > 1 and _int8_is_fast():
        product = torch._int_mm(integers.flatten(0, -2).to(torch.int8), weight.T)
        return product.to(integers.dtype).view(*integers.shape[:-1], len(weight))
    return torch.nn.functional.linear(integers, weight.to(integers.dtype))


@cache
def _int8_is_fast() -> bool:
    return bool(INT8_FLAGS & cpu_flags())


def _step(x: Tensor) -> Tensor:
    # 1/127 as the float32 constant that the graphs hold, in float64 too: every engine rounds the same numbers
    return torch.full((), 1 / QMAX, dtype=torch.float32, device=x.device).to(x.dtype)


def _round_(steps: Tensor) -> Tensor:
    """Round numbers, in steps, to the integers of int8, in place."""
    return steps.round_().clamp_(-QMAX - 1, QMAX)
