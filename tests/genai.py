"""Somebody else's program: onnxruntime-genai generates with an engine folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy
import onnxruntime_genai
import torch

from builders.onnxruntime.genai import GENAI


def genai_tokens(folder: Path, prompts: Sequence[Sequence[int]], new: int) -> list[list[int]]:
    """Its greedy tokens behind prompts, one batch, at most `new` of each; the model's end is among them.

    Shorter prompts are padded on the right, as its own tokenizer pads them. A prompt must not hold the pad token.
    """
    model = onnxruntime_genai.Model(str(folder))
    pad = json.loads((folder / GENAI).read_text(encoding="utf-8"))["model"].get("pad_token_id", 0)
    longest = max(map(len, prompts))
    parameters = onnxruntime_genai.GeneratorParams(model)
    parameters.set_search_options(max_length=longest + new, do_sample=False, batch_size=len(prompts))
    generator = onnxruntime_genai.Generator(model, parameters)
    rows = [[*prompt, *[pad] * (longest - len(prompt))] for prompt in prompts]
    generator.append_tokens(numpy.array(rows, dtype=numpy.int32))
    while not generator.is_done():
        generator.generate_next_token()
    torch.set_flush_denormal(False)  # its sessions set it for the thread that calls them, and leave it so
    return [[int(token) for token in generator.get_sequence(row)[longest:]] for row in range(len(prompts))]
