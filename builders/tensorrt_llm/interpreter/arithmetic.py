"""The arithmetic of NVIDIA's SmoothQuant kernels, and of Q/DQ, on PyTorch tensors.

    per token     a = max(1e-6, max_j |x_j|)        q = sat(rint(x * (127 / a)))        token_scale = a / 127
    per tensor    multiplier = 127 / calibrated maximum        q = sat(rint(x * multiplier))
    product       y = (q . w) * (activation scale * weight scale)        q . w in integers
    Q/DQ          q = sat(rint(x / input_scale))        y = (q . w) * (input_scale * weight_scale)

rint rounds half to even, sat clamps to [-128, 127]. Kernels: layernormKernels.cu, rmsnormKernels.cu, quantization.cu,
and the epilogue of the int8 GEMM in TensorRT-LLM. Every function returns the dtype of its input, float32 or float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from builders.tensorrt_llm.format.architectures import RUNNABLE_ACTIVATIONS

LEAST_AMAX = 1e-6  # the kernels begin their search for a token's maximum here
EXACT_COLUMNS = 1024  # the sum of so many products of int8 is at most 2^24, so float32 holds every partial sum


@dataclass(frozen=True)
class EnginePrecision:
    """The dtypes of a run.

    compute: the dtype of the arithmetic, float32 or float64. held: the dtype of the tensors between two kernels, as an
    engine writes them (float16 or bfloat16); None keeps them as computed.
    """

    compute: torch.dtype = torch.float32
    held: torch.dtype | None = None

    def hold(self, x: Tensor) -> Tensor:
        """The values of x after a kernel has written them, in the dtype of x."""
        return x if self.held is None else x.to(self.held).to(self.compute)


def quantize_per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    """The whole numbers (..., channels) and the token_scale (..., 1) of activations. x: (..., channels)."""
    amax = x.abs().amax(-1, keepdim=True).clamp_min(LEAST_AMAX)
    return _saturate(x * (127 / amax)), amax / 127


def quantize_per_tensor(x: Tensor, multiplier: Tensor) -> Tensor:
    """The whole numbers of activations, in the shape of x. multiplier: 127 / the calibrated maximum, one number."""
    return _saturate(x * multiplier.flatten().to(x.dtype))


def quantize_by_scale(x: Tensor, input_scale: Tensor) -> Tensor:
    """The whole numbers of activations, in the shape of x. input_scale: one number."""
    return _saturate(x / input_scale.flatten().to(x.dtype))


def integer_product(q: Tensor, weight: Tensor) -> Tensor:
    """The exact sums of products, (..., out), rounded once to q's dtype, as a kernel rounds its int32 accumulator.

    q: (..., in), whole numbers in [-128, 127]. weight: (out, in) int8.
    """
    if q.dtype == torch.float64:
        return linear(q, weight.double())
    total: Tensor | None = None
    for start in range(0, weight.shape[1], EXACT_COLUMNS):
        columns = slice(start, start + EXACT_COLUMNS)
        part = linear(q[..., columns], weight[:, columns].to(q.dtype)).double()
        total = part if total is None else total + part
    assert total is not None
    return total.to(q.dtype)


def rescale(accumulated: Tensor, activation_scale: Tensor, weight_scale: Tensor) -> Tensor:
    """The output of a linear, (..., out), from the sums of an integer product.

    accumulated: (..., out). activation_scale: (..., 1), or one number. weight_scale: (out,), or one number.
    """
    weight_scale = weight_scale.flatten().to(accumulated.dtype)
    if activation_scale.numel() == 1:
        activation_scale = activation_scale.flatten()
    return accumulated * (activation_scale.to(accumulated.dtype) * weight_scale)


def normalize(kind: str, x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float) -> Tensor:
    """The output of a norm, (..., channels). kind: "rms" or "layer". x: (..., channels). weight, bias: (channels,)."""
    if kind == "layer":
        x = x - x.mean(-1, keepdim=True)
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon) * weight.to(x.dtype)
    return x if bias is None else x + bias.to(x.dtype)


def gelu(x: Tensor) -> Tensor:
    """TensorRT-LLM's gelu: the tanh form under every name. (In Hugging Face "gelu" names the exact form.)"""
    return 0.5 * x * (torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x.pow(3))) + 1)


ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {"silu": silu, "relu": torch.relu, "gelu": gelu}


def activation(hidden_act: str, x: Tensor) -> Tensor:
    """The activation function of this name, of the format's `RUNNABLE_ACTIVATIONS`."""
    return ACTIVATIONS[RUNNABLE_ACTIVATIONS[hidden_act]](x)


def _saturate(x: Tensor) -> Tensor:
    return x.round().clamp(-128, 127)
