"""Write genai_config.json, with which onnxruntime-genai runs the folder.

The keys are those of onnxruntime-genai 0.18. Past and present share a buffer where the attention is grouped, and
Concat grows the cache where it is not.

An INT8 cache needs no key and no file of scales: the graph holds them. `kv_cache_scale_file` is an option of
onnxruntime-genai's builder, which puts the scales of a JSON file into the graph that it makes itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from builders.engine.generation import named_tokens
from builders.onnxruntime.session import SETTINGS
from smoothquant.artifacts.manifest import ModelFacts
from smoothquant.artifacts.ports import ATTENTION_MASK, INPUT_IDS, LOGITS, MODEL, POSITION_IDS, past, present

PROVIDER_OPTIONS: Mapping[str, Mapping] = {  # the providers that it has a name for
    "cuda": {"provider_options": [{"cuda": {}}]},
    "nv-tensorrt-rtx": {"provider_options": [{"NvTensorRtRtx": {}}]},
}
GENAI = "genai_config.json"
TYPE = "decoder"  # its name for a decoder of any family


def genai_config(
    folder: Path, geometry: ModelFacts, threads: int, provider: str = "cpu", *, shared: bool = False
) -> dict:
    """The content of genai_config.json. folder: holds config.json and generation_config.json, which name the tokens.

    geometry: the model's sizes, from the export's manifest. provider: a name of `providers.PROVIDERS`. shared: whether
    past and present are one buffer.
    """
    tokens = named_tokens(folder)
    end = None if tokens["eos_token_id"] == [] else tokens["eos_token_id"]
    first_end = end[0] if isinstance(end, list) else end
    decoder = {
        "filename": MODEL,
        "session_options": {"intra_op_num_threads": threads, **SETTINGS, **PROVIDER_OPTIONS.get(provider, {})},
        "head_size": geometry.head_dim,
        "hidden_size": geometry.hidden_size,
        "num_attention_heads": geometry.heads,
        "num_hidden_layers": geometry.layers,
        "num_key_value_heads": geometry.kv_heads,
        "inputs": {
            "input_ids": INPUT_IDS,
            "attention_mask": ATTENTION_MASK,
            "position_ids": POSITION_IDS,
            "past_key_names": past("%d", "key"),
            "past_value_names": past("%d", "value"),
        },
        "outputs": {
            "logits": LOGITS,
            "present_key_names": present("%d", "key"),
            "present_value_names": present("%d", "value"),
        },
    }
    length = geometry.max_positions
    model = {
        "type": TYPE,
        "vocab_size": geometry.vocab_size,
        "context_length": length,
        "bos_token_id": tokens["bos_token_id"],
        "eos_token_id": end,
        "pad_token_id": first_end if tokens["pad_token_id"] is None else tokens["pad_token_id"],
        "decoder": decoder,
    }
    model = {key: value for key, value in model.items() if value is not None}
    search = {"max_length": length, "past_present_share_buffer": shared}
    return {"model": model, "search": search}
