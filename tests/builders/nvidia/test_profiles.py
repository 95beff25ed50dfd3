"""Ranges of shapes, for the names that exporters give to inputs and dimensions."""

from __future__ import annotations

import pytest

from builders.nvidia.profiles import is_decoder_input, single_profile

PROFILE = single_profile(batch=4, tokens=256, past=512)


@pytest.mark.parametrize(
    ("name", "dimensions", "least", "most"),
    [
        ("input_ids", ("batch", "sequence"), (1, 1), (4, 256)),
        ("attention_mask", ("batch", "total"), (1, 1), (4, 768)),
        ("past_key_values.0.key", ("batch", 8, "past", 64), (1, 8, 0, 64), (4, 8, 512, 64)),
        # optimum's names
        ("input_ids", ("batch_size", "sequence_length"), (1, 1), (4, 256)),
        ("attention_mask", ("batch_size", "past_sequence_length + sequence_length"), (1, 1), (4, 768)),
        ("past_key_values.0.key", ("batch_size", 8, "past_sequence_length", 64), (1, 8, 0, 64), (4, 8, 512, 64)),
        # onnxruntime-genai's
        ("attention_mask", ("batch_size", "total_sequence_length"), (1, 1), (4, 768)),
        # no names
        ("attention_mask", ("", ""), (1, 1), (4, 768)),
        ("past_key_values.0.key", ("", 8, "", 64), (1, 8, 0, 64), (4, 8, 512, 64)),
        ("x", ("", "", 128), (1, 1, 128), (4, 256, 128)),
        ("x", (3, 128), (3, 128), (3, 128)),
    ],
)
def test_ranges(name: str, dimensions: tuple, least: tuple, most: tuple) -> None:
    found = PROFILE.shapes(name, dimensions)
    assert (found[0], found[2]) == (least, most)
    assert all(low <= usual <= high for low, usual, high in zip(*found, strict=True))


def test_an_input_that_no_decoder_has() -> None:
    assert not is_decoder_input("pixels", 2)
    assert not is_decoder_input("past_key_values.0.key_scale", 2)
