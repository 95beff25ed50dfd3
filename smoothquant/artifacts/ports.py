"""Names of a decoder's inputs and outputs in an ONNX graph, and so in every engine built from one.

    inputs   input_ids, attention_mask, position_ids, past_key_values.N.key, past_key_values.N.value
    outputs  logits, present.N.key, present.N.value

They are the names that Hugging Face's optimum gives them. N: the layer.
"""

from __future__ import annotations

INPUT_IDS, ATTENTION_MASK, POSITION_IDS = "input_ids", "attention_mask", "position_ids"
LOGITS = "logits"
PAST, PRESENT = "past_key_values.", "present."
CACHED = ("key", "value")


def past(layer: int | str, part: str) -> str:
    """The input that holds the keys or values of earlier tokens. part: of `CACHED`."""
    return f"{PAST}{layer}.{part}"


def present(layer: int | str, part: str) -> str:
    """The output that holds them with the new ones."""
    return f"{PRESENT}{layer}.{part}"


def past_of(present: str) -> str:
    """The input that an output becomes in the next run."""
    return PAST + present.removeprefix(PRESENT)
