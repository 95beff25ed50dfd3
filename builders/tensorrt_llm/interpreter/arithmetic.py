"""The arithmetic of NVIDIA's SmoothQuant kernels, and of Q/DQ, on PyTorch tensors.

    per token     a = max(1e-6, max_j |x_j|)        q = sat(rint(x * (127 / a)))        token_scale = a / 127
    per tensor    multiplier = 127 / calibrated maximum        q = sat(rint(x * multiplier))
    product       y = (q . w) * (activation scale * weight scale)        q . w in integers
    Q/DQ          q = sat(rint(x / input_scale))        y = (q . w) * (input_scale * weight_scale)

rint rounds half to even, sat clamps to [-128, 127]. Kernels: layernormKernels.cu, rmsnormKernels.cu, quantization.cu,
and the int8 GEMM's epilogue of TensorRT-LLM. Everything takes and gives the dtype of its input, float32 or float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from builders.tensorrt_llm.format.architectures import RUNNABLE_ACTIVATIONS

LEAST_AMAX = 1e-6  # where the kernels begin their search for a token's maximum
EXACT_COLUMNS = 1024  # that many products of int8 sum to 2^24 at most: float32 holds every partial sum


@dataclass(frozen=True)
class EnginePrecision:
    """compute: dtype of the arithmetic, float32 or float64.
    held: what an engine keeps between its kernels (its own dtype, float16 or bfloat16); None keeps it as computed."""

    compute: torch.dtype = torch.float32
    held: torch.dtype | None = None

    def hold(self, x: Tensor) -> Tensor:
        """What is left of x behind a kernel that writes it."""
        return x if self.held is None else x.to(self.held).to(self.compute)


def quantize_per_token(x: Tensor) -> tuple[Tensor, Tensor]:
    """x: (..., channels). Returns whole numbers (..., channels) and token_scale (..., 1)."""
    amax = x.abs().amax(-1, keepdim=True).clamp_min(LEAST_AMAX)
    return _saturate(x * (127 / amax)), amax / 127


def quantize_per_tensor(x: Tensor, multiplier: Tensor) -> Tensor:
    """x: any shape; multiplier: one number. Returns whole numbers of that shape."""
    return _saturate(x * multiplier.flatten().to(x.dtype))


def quantize_by_scale(x: Tensor, input_scale: Tensor) -> Tensor:
    """x: any shape; input_scale: one number. Returns whole numbers of that shape."""
    return _saturate(x / input_scale.flatten().to(x.dtype))


def integer_product(q: Tensor, weight: Tensor) -> Tensor:
    """q: (..., in) whole numbers in [-128, 127]; weight: (out, in) int8. Returns the exact sums, (..., out), rounded
    once to q's dtype as the int32 accumulator is."""
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
    """accumulated: (..., out); activation_scale: (..., 1) or one number; weight_scale: out numbers or one."""
    weight_scale = weight_scale.flatten().to(accumulated.dtype)
    if activation_scale.numel() == 1:
        activation_scale = activation_scale.flatten()
    return accumulated * (activation_scale.to(accumulated.dtype) * weight_scale)


def normalize(kind: str, x: Tensor, weight: Tensor, bias: Tensor | None, epsilon: float) -> Tensor:
    """kind: "rms" or "layer". x: (..., channels); weight, bias: (channels,)."""
    if kind == "layer":
        x = x - x.mean(-1, keepdim=True)
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon) * weight.to(x.dtype)
    return x if bias is None else x + bias.to(x.dtype)


def gelu(x: Tensor) -> Tensor:
    """TensorRT-LLM's gelu, by any name: the tanh form, where Hugging Face's "gelu" is the exact one."""
    return 0.5 * x * (torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x.pow(3))) + 1)


ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {"silu": silu, "relu": torch.relu, "gelu": gelu}


def activation(hidden_act: str, x: Tensor) -> Tensor:
    """The activation function of this name, of the format's `RUNNABLE_ACTIVATIONS`."""
    return ACTIVATIONS[RUNNABLE_ACTIVATIONS[hidden_act]](x)


def _saturate(x: Tensor) -> Tensor:
    return x.round().clamp(-128, 127)
