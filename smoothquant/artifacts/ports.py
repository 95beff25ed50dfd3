"""The names of a decoder's ONNX graphs, and of their inputs and outputs, which every engine shares with its graph.

    inputs   input_ids, attention_mask, position_ids, past_key_values.N.key, past_key_values.N.value
    outputs  logits, present.N.key, present.N.value

or, where the cache has buffers of a fixed capacity that a run writes in place (past and present are one memory):

    inputs   input_ids, write_indices, past_key_values.N.key, past_key_values.N.value
    outputs  logits, present.N.key, present.N.value

Hugging Face's optimum uses the names of the first form; write_indices is the word of ONNX (TensorScatter) and TensorRT
(KVCacheUpdate): how many tokens of each sequence its buffer already holds. N is the index of the layer. Who wants the
logits of the last tokens alone gives logits_to_keep, as in transformers: how many of them, int64 (1,). It may be left
away: without it, and with 0, there are the logits of all.
"""

from __future__ import annotations

from collections.abc import Sequence

from smoothquant.errors import UserError
from smoothquant.scheme import Scheme

MODEL = "model.onnx"
INPUT_IDS, ATTENTION_MASK, POSITION_IDS = "input_ids", "attention_mask", "position_ids"
WRITE_INDICES = "write_indices"
LOGITS, LOGITS_TO_KEEP = "logits", "logits_to_keep"
PAST, PRESENT = "past_key_values.", "present."
KEY = "key"
CACHED = (KEY, "value")


def past(layer: int | str, part: str) -> str:
    """The name of the input that holds the keys or values of earlier tokens. part: "key" or "value"."""
    return f"{PAST}{layer}.{part}"


def present(layer: int | str, part: str) -> str:
    """The name of the output that holds the keys or values of earlier and new tokens. part: "key" or "value"."""
    return f"{PRESENT}{layer}.{part}"


def past_of(present: str) -> str:
    """The name of the input that an output becomes in the next run."""
    return PAST + present.removeprefix(PRESENT)


def graph_files(schemes: Sequence[Scheme]) -> dict[str, Scheme]:
    """The scheme of each graph file of an export, by the file's name. The first file is `MODEL`; the names of others
    hold the form of their activations.

    Raises UserError for graphs that differ in anything but their activations.
    """
    forms = [scheme.activations.form for scheme in schemes]
    shared = {(scheme.weights, scheme.kv_cache, scheme.head, scheme.embedding) for scheme in schemes}
    if len(shared) > 1 or len(set(forms)) < len(forms):
        raise UserError(
            f"graphs with {' and '.join(forms)} activations in one folder",
            expected="graphs that share weights, KV cache, head and embedding, and differ in their activations",
        )
    return {f"model.{form}.onnx" if n else MODEL: schemes[n] for n, form in enumerate(forms)}
