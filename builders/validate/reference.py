"""The reference of every engine: the original checkpoint, its weights as stored, computed in float32 by our decoder.

One layer of the model is in memory at a time (with its int8 form per scheme), the hidden states of all sequences
beside it. Logits are made one sequence at a time, on demand: they never exist all at once. A 70B model takes a few
gigabytes. One pass serves any number of engines.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from builders.validate.layers import W8A8Stream, input_groups
from builders.validate.scheme import Scheme
from smoothquant import decoder
from smoothquant.errors import UserError
from smoothquant.model import Model
from smoothquant.quantization import absmax

Progress = Callable[[int, int], None]  # (done, total)
STORED = {torch.float16: "FP16", torch.bfloat16: "BF16", torch.float32: "FP32"}


class Text(Protocol):
    """Held-out text. sequences: token ids, each (tokens,) int64; source: where it is from; fingerprint: of its ids."""

    @property
    def sequences(self) -> tuple[Tensor, ...]: ...

    @property
    def source(self) -> str: ...

    @property
    def fingerprint(self) -> str: ...


class Reference:
    """What a model makes of a text, in float and in the W8A8 forms of `schemes`.

    exact: also compute the W8A8 forms in float64, the yardstick of exactness.
    progress: called with (layers done, layers).

    Attributes:
        fingerprint: of the model. name: "FP16", "BF16" or "FP32", by how the weights are stored.
        act_absmax: linear -> float32 (in,), maxima of |input| on this text; linears with a common input hold it once,
            under the first of them.
        streams: scheme key -> `W8A8Stream`, with its per-layer errors; none for float engines.

    Raises UserError for a text that is too short or too long for the model, or made with another tokenizer.
    """

    def __init__(
        self,
        model: Model,
        text: Text,
        schemes: Sequence[Scheme] = (),
        *,
        exact: bool = False,
        progress: Progress = lambda done, total: None,
    ) -> None:
        _check_text(model, text)
        self.model, self.text = model, text
        self.fingerprint = model.checkpoint.fingerprint()
        self.name = STORED[model.checkpoint.dtype]
        self.act_absmax: dict[str, Tensor] = {}
        self._run(schemes, exact, progress)

    @property
    def description(self) -> str:
        """What exactly "the reference" is, in words."""
        return f"the original checkpoint: weights as stored ({self.name}), arithmetic in float32"

    @property
    def tokens(self) -> int:
        return sum(len(ids) for ids in self.text.sequences)

    @torch.no_grad()
    def logits(self, sequence: int) -> Tensor:
        """Float logits of one sequence, float32 (tokens, vocab)."""
        return decoder.logits(self.model, self._hidden[sequence])[0]

    @torch.no_grad()
    def _run(self, schemes: Sequence[Scheme], exact: bool, progress: Progress) -> None:
        model, geometry, sequences = self.model, self.model.geometry, self.text.sequences
        embedded = model.embed(torch.cat(sequences)).float()
        self._hidden = [part[None] for part in embedded.split([len(ids) for ids in sequences])]
        quantized = {scheme.key: scheme for scheme in schemes if scheme.activations != "float"}
        self.streams = {key: W8A8Stream(model, scheme, self._hidden, exact) for key, scheme in quantized.items()}
        self._first_of_input = {group[0] for group in input_groups(model)}
        progress(0, geometry.layers)
        for index in range(geometry.layers):
            self._layer(index)
            progress(index + 1, geometry.layers)

    def _layer(self, index: int) -> None:
        def listen(role: str, x: Tensor, y: Tensor) -> None:
            if role in self._first_of_input:
                name = self.model.linear(index, role)
                seen = absmax(x.flatten(0, -2), dim=0)
                self.act_absmax[name] = torch.maximum(seen, self.act_absmax.get(name, seen))
            for stream in self.streams.values():
                stream.compare(role, x, y)

        geometry = self.model.geometry
        source = replace(decoder.float_layer(self.model, index), listen=listen)
        for stream in self.streams.values():
            stream.enter(index, source)
        for sequence, hidden in enumerate(self._hidden):
            rotary = decoder.rotary(geometry, hidden.shape[1], torch.float32)
            self._hidden[sequence] = decoder.forward(geometry, source, hidden, rotary)
            for stream in self.streams.values():
                stream.advance(sequence, self._hidden[sequence])
        for stream in self.streams.values():
            stream.leave()


def _check_text(model: Model, text: Text) -> None:
    geometry, sequences = model.geometry, text.sequences
    if not any(len(ids) > 1 for ids in sequences):
        raise UserError(
            f"{text.source}: no sequence of two tokens or more", expected="text to predict", do="give a longer text"
        )
    longest = max(len(ids) for ids in sequences)
    if longest > geometry.max_positions:
        raise UserError(
            f"{text.source}: a sequence of {longest} tokens",
            expected=f"at most {geometry.max_positions}, this model's context",
            do="cut the text into shorter sequences",
        )
    low, high = (int(torch.cat(sequences).aminmax()[bound]) for bound in (0, 1))
    if low < 0 or high >= geometry.vocab_size:
        raise UserError(
            f"{text.source}: token {high if high >= geometry.vocab_size else low}",
            expected=f"tokens of this model, 0 to {geometry.vocab_size - 1}",
            do="tokenize the text with the model's own tokenizer",
        )
