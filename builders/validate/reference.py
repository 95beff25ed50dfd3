"""The reference of every engine: the original checkpoint, its weights as stored, computed in float32 by our decoder.

One sweep over the layers (`smoothquant.sweep`) serves any number of engines: beside the float layers it runs their
W8A8 forms. Logits are made one sequence at a time, on demand: they never exist all at once.
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
from smoothquant.model import Model
from smoothquant.sweep import FLOAT, Progress, sweep
from smoothquant.workspace import Workspace

STORED = {torch.float16: "FP16", torch.bfloat16: "BF16", torch.float32: "FP32"}


class HeldOutText(Protocol):
    """Held-out text. sequences: token ids, each (tokens,) int64; source: where it is from; fingerprint: of its ids."""

    @property
    def sequences(self) -> tuple[Tensor, ...]: ...

    @property
    def source(self) -> str: ...

    @property
    def fingerprint(self) -> str: ...


class Reference:
    """What a model makes of a text, in float and in the W8A8 forms of `schemes`.

    exact: also compute the W8A8 forms in float64, the yardstick of exactness. device: where to compute.
    work: an interrupted pass goes on from there.
    progress: called with (layers done, layers).

    Attributes:
        fingerprint: of the model. name: "FP16", "BF16" or "FP32", by how the weights are stored.
        act_absmax: linear -> float32 (in,), maxima of |input| on this text; linears with a common input hold it once,
            under the first of them.
        held_absmax: layer or head -> float32 (1,), how far it reaches on this text (`smoothquant.float16`).
        streams: scheme key -> `W8A8Stream`, with its per-layer errors; none for float engines.

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
        work: Workspace | None = None,
        progress: Progress = lambda done, total: None,
    ) -> None:
        check_text(model, text)
        self.model, self.text, self.device = model, text, device
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
            keep_last=True,
            progress=progress,
        )
        self.act_absmax, self.held_absmax = maxima.found, held.with_head(self._end)

    @property
    def description(self) -> str:
        """What exactly "the reference" is, in words."""
        return f"the original checkpoint: weights as stored ({self.name}), arithmetic in float32"

    @property
    def tokens(self) -> int:
        return sum(len(ids) for ids in self.text.sequences)

    def hidden(self, sequence: int, form: str = FLOAT) -> Tensor:
        """Hidden states (tokens, hidden) of one sequence after the last layer, in a form of the layers."""
        return self._end.states(sequence, form)

    @torch.no_grad()
    def logits(self, sequence: int) -> Tensor:
        """Float logits of one sequence, float32 (tokens, vocab)."""
        return decoder.logits(self.model, self.hidden(sequence)[None].to(self.device))[0]

    @torch.no_grad()
    def w8a8_logits(self, scheme: EngineScheme, sequence: int, dtype: torch.dtype) -> Tensor:
        """Logits (tokens, vocab) of the W8A8 form by PyTorch. dtype: float32, or float64 of an exact reference."""
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
