"""Whether an engine in float16 would overflow on the text of the reference, where running it here cannot show that.

ONNX Runtime on a CPU computes float16 graphs in float32, and transformers runs Hugging Face folders in float32. The
reference knows how far everything reaches that their engines hold in float16 elsewhere (`smoothquant.float16`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from builders.engine.protocol import ANYBODY, FOREIGN, ForeignInputs
from builders.validate.ranges import Range
from builders.validate.reference import Reference
from smoothquant.artifacts.manifest import Manifest
from smoothquant.device import declared_dtype
from smoothquant.float16 import LARGEST, beyond
from smoothquant.model import Model

SHOWN = ("build tensorrt", "export trtllm", FOREIGN)  # steps whose engines run here in the dtype that they hold


def overflow(manifest: Manifest, reference: Reference, ranges: Sequence[Range]) -> str:
    """Where an engine overflows, in words; empty for one that does not, or that holds no float16. ranges: of it."""
    if not holds_float16(manifest, reference.model):
        return ""
    fault = beyond(reference.model, reference.held_absmax) or _within(reference.model, ranges)
    return fault and f"{fault} on this text, and the engine's float16 holds at most {LARGEST:.0f}"


def holds_float16(manifest: Manifest, model: Model) -> bool:
    """Whether an engine of `model` holds activations in float16."""
    if manifest.step in (FOREIGN, ANYBODY):
        return manifest.inputs_as(ForeignInputs).dtype == "float16"
    origin = manifest.origin
    if origin.onnx:
        return origin.onnx.body == "fp16"
    told = origin.trtllm or origin.hf
    if told and told.dtype != "as stored":
        return told.dtype == "float16"
    return declared_dtype(model.checkpoint.config, model.checkpoint.dtype) == torch.float16


def _within(model: Model, ranges: Sequence[Range]) -> str:
    for found in ranges:
        if found.after_max > LARGEST:
            return f"the input of {model.linear(found.layer, found.roles[0])} reaches {found.after_max:.3g}"
    return ""
