"""The W8A8 model in compressed-tensors' int-quantized format, which vLLM serves and transformers loads."""

from __future__ import annotations

from pathlib import Path

from exporters.card import FORMS
from exporters.huggingface.dialects import DIALECTS
from exporters.huggingface.int8 import Int8Writer
from smoothquant.artifacts.shards import MAX_SHARD
from smoothquant.int8_config import COMPRESSED_TENSORS
from smoothquant.scheme import PER_TOKEN, Scheme


class W8A8Writer(Int8Writer):
    """Writes the W8A8 checkpoint to the folder `out`. scheme: int8 weights per output channel, float cache and head.

    What stays float keeps its dtype.
    """

    step = "export w8a8"
    wider = 'write "torch_dtype": "bfloat16" into config.json of the model: who loads it casts the weights'
    form = FORMS[COMPRESSED_TENSORS]
    dialect = DIALECTS[COMPRESSED_TENSORS]

    def __init__(self, out: str | Path, scheme: Scheme = PER_TOKEN, max_shard: int = MAX_SHARD) -> None:
        super().__init__(out, scheme, max_shard=max_shard)
