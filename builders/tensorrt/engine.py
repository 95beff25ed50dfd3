"""Run an engine folder on the GPU that it was built for: logits of whole sequences, and generation."""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from builders.engine.generation import GeneratingEngine
from builders.tensorrt import hardware
from builders.tensorrt.record import TensorRTInputs
from builders.tensorrt.runtime import LoadedPlan
from builders.tensorrt.session import CachedDecoding, Session
from smoothquant.errors import UserError
from smoothquant.workspace import load_manifest

PLAN = "model.plan"


class TensorRTEngine(GeneratingEngine):
    """An engine folder that `build tensorrt` made, loaded on the GPU.

    Raises MissingPackageError without TensorRT or a GPU, UserError if the plan is for another GPU or version.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest = load_manifest(folder)
        version, gpu = hardware.require_tensorrt(), hardware.find_gpu()
        made = self.manifest.inputs_as(TensorRTInputs)
        hardware.check_plan_fits(self.folder, made, gpu, version)
        self.limits, options, name = made.limits, made.options, str(self.folder / PLAN)
        if not self.manifest.files[PLAN]:
            raise UserError(f"{name}: empty", expected="TensorRT's plan", do="copy it again, or build the engine again")
        with open(name, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            plan = LoadedPlan(
                content, name, gpu, trusted=options.version_compatible, streaming=options.weight_streaming
            )
        self.session = Session(plan, self.limits)

    @property
    def longest(self) -> int:
        return self.limits.length

    def logits(self, ids: Tensor) -> Tensor:
        """The logits of whole sequences without padding, float32 (batch, tokens, vocab). ids: int64 (batch, tokens)."""
        self.check_length(ids.shape[1])
        return torch.cat([self.session.logits(rows) for rows in ids.split(self.limits.batch)])

    def start(self, prompt: Sequence[int]) -> CachedDecoding:
        """A sequence after its prompt. prompt: token ids."""
        return CachedDecoding(self.session, prompt)
