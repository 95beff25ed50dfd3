"""The smoothed float model: the same function, with weights that any W8A8 quantizer takes well.

A plain Hugging Face checkpoint of the same architecture; `AutoModelForCausalLM.from_pretrained` loads it as is.
"""

from __future__ import annotations

from pathlib import Path

import torch

from exporters.card import SMOOTHED
from exporters.huggingface.tensors import CheckpointTensor, CheckpointWriter, float_tensors
from smoothquant.artifacts.manifest import HuggingFaceOptions
from smoothquant.artifacts.shards import MAX_SHARD
from smoothquant.model import Model
from smoothquant.scheme import IN_FLOAT


class SmoothedWriter(CheckpointWriter):
    """Writes the smoothed float checkpoint to the folder `out`.

    dtype: of the weights; None keeps each tensor's own. In a 16-bit dtype the smoothed weights are rounded once more
    than the original's were.
    """

    step = "export hf"
    wider = "export with --dtype bfloat16"
    form = SMOOTHED

    def __init__(self, out: str | Path, dtype: torch.dtype | None = None, max_shard: int = MAX_SHARD) -> None:
        super().__init__(out, max_shard)
        self.dtype = dtype
        self.schemes = (IN_FLOAT,)
        self.options = {"hf": HuggingFaceOptions(str(dtype).removeprefix("torch.") if dtype else "as stored")}

    def plan(self, model: Model) -> dict[str, CheckpointTensor]:
        return float_tensors(model, self.dtype)

    def config(self, model: Model) -> dict:
        config = dict(model.checkpoint.config)
        if self.dtype:
            config["dtype"] = config["torch_dtype"] = str(self.dtype).removeprefix("torch.")
        return config
