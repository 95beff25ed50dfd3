"""What a constant token before every text does to a float model: the floor of any scheme that relies on one.

    python -m tests.benchmarks.constant_prefix MODEL TEXT     # real weights

The first token draws the spikes to itself, and static ranges need not hold them if its keys and values are computed in
float once (PrefixQuant, Chen et al., 2024; CushionCache, Son et al., 2024). But a model that was not trained with such
a token is another function behind it. Told are the KL of the float model behind the token to that without, and the
largest input of a down_proj at the first token and at the others.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer

from act_scales.search.outcome import distances
from act_scales.text import load_text
from recipes.families import open_model
from smoothquant.layers import FloatLayer, Layer
from smoothquant.listener import Listener
from smoothquant.model import Model
from smoothquant.roles import parsed
from smoothquant.sweep import FLOAT, Sweep, sweep
from tests.benchmarks.results import Row, publish

SAMPLES, LENGTH = 4, 512
PREFIXES = ("<|endoftext|>", "<|im_start|>", "\n", ",")


class Spikes(Listener):
    """The largest inputs of down_proj. first: at the first token; others: at all others."""

    def __init__(self) -> None:
        self.first = self.others = 0.0

    def enter(self, source: FloatLayer) -> dict[str, Layer]:
        return {}

    def listen(self, role: str, x: Tensor, y: Tensor) -> None:
        if parsed(role).kind == "down":
            largest = x.abs().amax(dim=-1)
            self.first = max(self.first, largest[:, 0].max().item())
            self.others = max(self.others, largest[:, 1:].max().item())


class Behind:
    """The end of a sweep without the first token of every sequence."""

    def __init__(self, end: Sweep) -> None:
        self.end = end

    def states(self, sequence: int, form: str = FLOAT) -> Tensor:
        return self.end.states(sequence, form)[1:]


def main(folder: str, text_file: str) -> None:
    model: Model = open_model(folder)
    text = load_text(text_file, folder, SAMPLES, LENGTH).for_model(model)
    encode = AutoTokenizer.from_pretrained(folder).encode
    spikes = Spikes()
    reference = sweep(model, text.sequences, [spikes])
    rows = [Row("no prefix", f"first token {spikes.first:.0f}, others {spikes.others:.0f}")]
    details = {}
    for prefix in PREFIXES:
        [token] = encode(prefix, add_special_tokens=False)
        begun = tuple(torch.cat([torch.tensor([token]), ids]) for ids in text.sequences)
        spikes = Spikes()
        end = sweep(model, begun, [spikes])
        [found] = distances(model, text.sequences, reference, [Behind(end)])
        details[prefix] = {"kl": found.kl, "first": spikes.first, "others": spikes.others}
        rows.append(Row(repr(prefix), f"KL {found.kl:.4f}, first token {spikes.first:.0f}, others {spikes.others:.0f}"))
    publish("constant_prefix", rows, {"name": Path(folder).name, "tokens": text.tokens, "prefixes": details})


if __name__ == "__main__":
    main(*sys.argv[1:])
