"""The W8A8 model in ModelOpt's form, which TensorRT Edge-LLM reads: static activations, everything else in float16.

Edge-LLM computes in float16, and casts what is bfloat16 when it loads it. Smoothing is folded: no linear has a
`pre_quant_scale`, the factor of its input that Edge-LLM applies at run time.
"""

from __future__ import annotations

from pathlib import Path

import torch

from exporters.card import FORMS
from exporters.huggingface.dialects import DIALECTS
from exporters.huggingface.int8 import Int8Writer
from smoothquant.artifacts.manifest import HuggingFaceOptions
from smoothquant.artifacts.shards import MAX_SHARD
from smoothquant.int8_config import MODELOPT
from smoothquant.scheme import PER_TENSOR, Scheme


class ModelOptWriter(Int8Writer):
    """Writes ModelOpt's form to the folder `out`. scheme: int8 weights per output channel, static activations."""

    step = "export modelopt"
    wider = "use export w8a8 with bfloat16: TensorRT Edge-LLM has nothing wider"
    form = FORMS[MODELOPT]
    dialect = DIALECTS[MODELOPT]

    def __init__(self, out: str | Path, scheme: Scheme = PER_TENSOR, max_shard: int = MAX_SHARD) -> None:
        super().__init__(out, scheme, torch.float16, max_shard)
        self.options = {"hf": HuggingFaceOptions("float16")}
