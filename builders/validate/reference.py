"""The reference of every engine: the original checkpoint, its weights as stored, computed in float32 by our decoder.

One layer of the model is in memory at a time (with its int8 form per scheme), the hidden states of all sequences
beside it; sequences of one length go through it together, some thousand tokens at a time. Logits are made one
sequence at a time, on demand: they never exist all at once. One pass serves any number of engines.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Protocol

import torch
from torch import Tensor

from builders.validate.layers import W8A8Stream
from builders.validate.scheme import EngineScheme
from smoothquant import decoder
from smoothquant.attention import patterns
from smoothquant.errors import UserError
from smoothquant.layers import float_layer
from smoothquant.model import Model
from smoothquant.quantization import absmax

Progress = Callable[[int, int], None]  # (done, total)
BATCH = 2048  # tokens that go through a layer together, if that many sequences have one length
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
        schemes: Sequence[EngineScheme] = (),
        *,
        exact: bool = False,
        progress: Progress = lambda done, total: None,
    ) -> None:
        check_text(model, text)
        self.model, self.text = model, text
        self.fingerprint = model.checkpoint.fingerprint
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
        batch, row = self._place[sequence]
        return decoder.logits(self.model, self._hidden[batch][row : row + 1])[0]

    @torch.no_grad()
    def w8a8_logits(self, scheme: EngineScheme, sequence: int, dtype: torch.dtype) -> Tensor:
        """Logits (tokens, vocab) of the W8A8 form by PyTorch. dtype: float32, or float64 of an exact reference."""
        batch, row = self._place[sequence]
        return self.streams[scheme.key].logits(batch, row, dtype)

    @torch.no_grad()
    def _run(self, schemes: Sequence[EngineScheme], exact: bool, progress: Progress) -> None:
        model, geometry = self.model, self.model.geometry
        batches = _batches(self.text.sequences)
        self._place = [(batch, row) for batch, ids in enumerate(batches) for row in range(len(ids))]
        positions = [torch.arange(ids.shape[1]).expand_as(ids).flatten() for ids in batches]
        flat = torch.cat([ids.flatten() for ids in batches])
        embedded = decoder.embed(model, flat[None], torch.float32, torch.cat(positions)[None])[0]
        parts = embedded.split([ids.numel() for ids in batches])
        self._hidden = [part.view(*ids.shape, -1) for part, ids in zip(parts, batches, strict=True)]
        dtypes = (torch.float32, torch.float64) if exact else (torch.float32,)
        longest = max(ids.shape[1] for ids in batches)
        self._patterns = {dtype: patterns(model, longest, dtype) for dtype in dtypes}
        quantized = {scheme.key: scheme for scheme in schemes if scheme.activations != "float"}
        self.streams = {key: W8A8Stream(model, scheme, self._hidden, exact) for key, scheme in quantized.items()}
        self._first_of_input = {group[0] for group in model.inputs}
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

        source = float_layer(self.model, index, listen=listen)
        for stream in self.streams.values():
            stream.enter(index, source)
        for batch, hidden in enumerate(self._hidden):
            upto = {dtype: longest.upto(hidden.shape[1]) for dtype, longest in self._patterns.items()}
            self._hidden[batch] = decoder.forward(self.model, source, hidden, upto[torch.float32])
            for stream in self.streams.values():
                stream.advance(batch, self._hidden[batch], upto)
        for stream in self.streams.values():
            stream.leave()


def _batches(sequences: Sequence[Tensor]) -> list[Tensor]:
    """Consecutive sequences of one length, stacked: (sequences, tokens) each, `BATCH` tokens or one sequence."""
    batches = []
    for length, group in groupby(sequences, key=len):
        batches += torch.stack(list(group)).split(max(1, BATCH // max(length, 1)))
    return batches


def check_text(model: Model, text: Text) -> None:
    """Raise UserError for a text that is too short or too long for a model, or made with another tokenizer."""
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
