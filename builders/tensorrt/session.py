"""Run a plan on sequences: one run after the other, with the cache between them.

A prompt runs through the prefill profile in chunks, then a token at a time through the decode profile.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from builders.engine.generation import Decoding
from builders.tensorrt.cache import Cache, InPlaceCache
from builders.tensorrt.limits import Limits, profile_of
from builders.tensorrt.runtime import Binding, LoadedPlan
from smoothquant.artifacts.ports import ATTENTION_MASK, INPUT_IDS, LOGITS, PAST, POSITION_IDS, WRITE_INDICES


class Session:
    """A plan with the limits that it was built for."""

    def __init__(self, plan: LoadedPlan, limits: Limits) -> None:
        self.plan, self.gpu, self.limits = plan, plan.gpu, limits
        self.past = [port for port in plan.ports.values() if port.name.startswith(PAST)]

    def logits(self, ids: Tensor) -> Tensor:
        """The logits of all tokens, float32 (batch, tokens, vocab) on the CPU. ids: int64 (batch, tokens), within the
        limits."""
        return torch.cat([logits.float().cpu() for logits in Runs(self, len(ids)).prefill(ids)], dim=1)


class Runs:
    """The runs of one batch of sequences. The attribute `tokens` counts the tokens of each sequence so far."""

    def __init__(self, session: Session, batch: int) -> None:
        self.session, self.batch, self.tokens = session, batch, 0
        self.device, limits = session.gpu.device, session.limits
        with session.gpu.use():
            self.cache: Cache | InPlaceCache
            if limits.capacity is None:
                self.cache = Cache(session.past, batch, limits.cache + limits.chunk, limits.window, self.device)
            else:
                self.cache = InPlaceCache(session.past, batch, limits.capacity, self.device)

    def prefill(self, ids: Tensor) -> Iterator[Tensor]:
        """Yield the logits of every chunk, (batch, tokens of the chunk, vocab). ids: (batch, tokens)."""
        first = 0
        for size in self.session.limits.chunks(ids.shape[1]):
            yield self.run(ids[:, first : first + size])
            first += size

    def run(self, ids: Tensor) -> Tensor:
        """The logits of one run, (batch, tokens, vocab), after waiting for them. ids: (batch, tokens)."""
        gpu, plan, tokens = self.session.gpu, self.session.plan, ids.shape[1]
        with gpu.use():
            port = plan.ports[LOGITS]
            logits = torch.empty(self.batch, tokens, port.shape[-1], dtype=port.dtype, device=self.device)
            tensors = {INPUT_IDS: ids.to(self.device).contiguous(), LOGITS: logits, **self._places(tokens)}
            bindings = {name: Binding(tuple(tensor.shape), tensor) for name, tensor in tensors.items()}
            plan.run(profile_of(tokens), {**bindings, **dict(self.cache.bindings(tokens))})
            self.cache.advance(tokens)
            self.tokens += tokens
        gpu.wait()
        return logits

    def _places(self, tokens: int) -> dict[str, Tensor]:
        """The inputs that say where the tokens of a run stand."""
        if self.session.limits.capacity is not None:
            return {WRITE_INDICES: torch.full((self.batch,), self.tokens, dtype=torch.int64, device=self.device)}
        total = (self.batch, self.cache.cached + tokens)
        places = torch.arange(self.tokens, self.tokens + tokens, device=self.device)
        return {
            ATTENTION_MASK: torch.ones(total, dtype=torch.int64, device=self.device),
            POSITION_IDS: places.expand(self.batch, tokens).contiguous(),
        }


class CachedDecoding(Decoding):
    """One sequence under way. logits: the logits of its last token, float32 (vocab,)."""

    def __init__(self, session: Session, prompt: Sequence[int]) -> None:
        self._runs = Runs(session, 1)
        for logits in self._runs.prefill(torch.tensor([prompt], dtype=torch.int64)):
            self.logits = logits[0, -1].float().cpu().numpy()

    def step(self, token: int) -> None:
        """Append a token to the sequence and compute its logits."""
        self.logits = self._runs.run(torch.tensor([[token]]))[0, -1].float().cpu().numpy()
