"""The file smoothquant/smoothing.safetensors of every export and engine: folded scales, and the ranges behind scales.

    <linear>.smoothing_scale    float32 (in,), if the input is smoothed
    <layer>.key.smoothing_scale float32 (kv_size,), if the keys of an 8-bit cache are smoothed
    <head>.smoothing_scale      float32 (hidden,), if the input of the output head is smoothed
    <linear>.input_absmax       float32 (in,), calibrated maxima of the smoothed input
    <layer>.key.cache_scale     float32 scalar, for an 8-bit KV cache; the same for value

With the checkpoint and the manifest it is enough to compute every layer of the engine again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from smoothquant.errors import UserError, raise_refusal
from smoothquant.outputs import OURS

SMOOTHING = f"{OURS}/smoothing.safetensors"
SCALE, ABSMAX, CACHE_SCALE = ".smoothing_scale", ".input_absmax", ".cache_scale"
ENDS = (SCALE, ABSMAX, CACHE_SCALE)


@dataclass(frozen=True)
class SmoothingFile:
    """The content of a smoothing file.

    smoothing_scale, input_absmax: float32 (in,) for each linear; the divisors of keys are in smoothing_scale, too, by
    `<layer>.key`, and that of the output head's input. cache_scale: a float32 scalar for each layer and part. digest: a
    hash of the file's bytes.
    """

    smoothing_scale: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    input_absmax: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    cache_scale: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    digest: str = ""


def tensors(
    smoothing_scale: Mapping[str, Tensor], input_absmax: Mapping[str, Tensor], cache_scale: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The entries of the file, copied. The arguments are those of `SmoothingFile`."""
    named = ((smoothing_scale, SCALE), (input_absmax, ABSMAX), (cache_scale, CACHE_SCALE))
    return {name + end: value.clone() for values, end in named for name, value in values.items()}


def read_smoothing(folder: Path) -> SmoothingFile:
    """The smoothing file of a folder. Raises UserError if it cannot be read."""
    path = folder / SMOOTHING
    try:
        content = path.read_bytes()
        found = load(content)
    except (OSError, SafetensorError) as error:
        raise_refusal(error, path)
        raise UserError(
            f"{path}: cannot be read ({error})",
            expected="the smoothing scales that every export records",
            do="make it again with smoothquant export",
        ) from error
    scale, absmax, cache = (
        {name.removesuffix(end): value.to(torch.float32) for name, value in found.items() if name.endswith(end)}
        for end in ENDS
    )
    return SmoothingFile(scale, absmax, cache, hashlib.sha256(content).hexdigest()[:16])
