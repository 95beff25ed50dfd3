"""The reference of every engine: the original checkpoint with its stored weights, run in float32 by our decoder.

One sweep over the layers (`smoothquant.sweep`) serves any number of engines: beside the float layers it runs their
W8A8 forms. Logits are computed one sequence at a time, on demand, so they never exist all at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from builders.validate.layers import W8A8Stream
from builders.validate.ranges import InputMaxima
from builders.validate.scheme import EngineScheme
from smoothquant import decoder
from smoothquant.errors import UserError
from smoothquant.float16 import HeldMaxima
from smoothquant.memory import UNLIMITED, Budget
from smoothquant.model import Model
from smoothquant.sweep import FLOAT, Progress, sweep
from smoothquant.team import ALONE, Team
from smoothquant.workroom import Workroom

STORED = {torch.float16: "FP16", torch.bfloat16: "BF16", torch.float32: "FP32"}


class HeldOutText(Protocol):
    """Held-out text. sequences: the token ids, int64 (tokens,) each. source: the name of the text. fingerprint: a hash
    of the ids. sequence_start: the special tokens that every sequence begins with, as the tokenizer spells them; empty
    for none."""

    @property
    def sequences(self) -> tuple[Tensor, ...]: ...

    @property
    def source(self) -> str: ...

    @property
    def fingerprint(self) -> str: ...

    @property
    def sequence_start(self) -> str: ...


class Reference:
    """The results of a model on a text, in float and in the W8A8 forms of `schemes`.

    exact: whether to compute the W8A8 forms in float64, too, the yardstick of exactness. device: the device that
    computes. work: the workspace of an interrupted pass, which is continued. budget: what may be in memory. team: the
    processes that share the sequences. progress: called with (layers done, all layers).

    Attributes:
        fingerprint: the fingerprint of the model. name: "FP16", "BF16" or "FP32", the dtype of the stored weights.
        act_absmax: for each linear the maxima of |input| on this text, float32 (in,). Linears with a common input have
            one entry, under the first of them.
        held_absmax: for each layer, and the head, how far it reaches on this text, float32 (1,)
            (`smoothquant.float16`).
        streams: for each scheme key its `W8A8Stream` with its errors; float engines have none.
        sequences: the places of those that this rank has the hidden states of.

    Raises UserError for a text that is too short or too long for the model, or made with another tokenizer.
    """

    def __init__(
        self,
        model: Model,
        text: HeldOutText,
        schemes: Sequence[EngineScheme] = (),
        *,
        exact: bool = False,
        device: str = "cpu",
        work: Workroom | None = None,
        budget: Budget = UNLIMITED,
        team: Team = ALONE,
        progress: Progress = lambda done, total: None,
    ) -> None:
        check_text(model, text)
        self.model, self.text, self.device, self.team = model, text, device, team
        self.fingerprint = model.checkpoint.fingerprint
        self.name = STORED[model.checkpoint.dtype]
        quantized = {scheme.key: scheme for scheme in schemes if scheme.scheme.quantized}
        self.streams = {key: W8A8Stream(model, scheme, exact, device) for key, scheme in quantized.items()}
        maxima, held = InputMaxima(model), HeldMaxima(model)
        self._end = sweep(
            model,
            text.sequences,
            [maxima, held, *self.streams.values()],
            device=device,
            work=work,
            team=team,
            keep_last=True,
            budget=budget,
            progress=progress,
        )
        self.sequences = self._end.sequences
        self.act_absmax, self.held_absmax = maxima.found, held.with_head(self._end)

    @property
    def description(self) -> str:
        """A description of the reference, for reports."""
        return f"the original checkpoint: weights as stored ({self.name}), arithmetic in float32"

    @property
    def tokens(self) -> int:
        return sum(len(ids) for ids in self.text.sequences)

    def hidden(self, sequence: int, form: str = FLOAT) -> Tensor:
        """The hidden states of one of `sequences` after the last layer, (tokens, hidden). form: of the layers."""
        return self._end.states(sequence, form)

    @torch.no_grad()
    def logits(self, sequence: int) -> Tensor:
        """The float logits of one sequence, float32 (tokens, vocab)."""
        return decoder.logits(self.model, self.hidden(sequence)[None].to(self.device))[0]

    @torch.no_grad()
    def w8a8_logits(self, scheme: EngineScheme, sequence: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """The logits of the W8A8 form in PyTorch, (tokens, vocab). dtype: float32, or float64 if the reference is
        exact."""
        stream = self.streams[scheme.key]
        return stream.logits(self.hidden(sequence, stream.form(dtype)))


def check_text(model: Model, text: HeldOutText) -> None:
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
