"""Run a plan on sequences: one run after the other, with the cache between them.

A prompt runs through the prefill profile in chunks, then a token at a time through the decode profile. What a run is
given lies where it lay in the run before, as long as runs have one number of tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy
import torch
from torch import Tensor

from builders.engine.generation import Decoding
from builders.tensorrt.cache import Cache, InPlaceCache
from builders.tensorrt.limits import Limits, profile_of
from builders.tensorrt.runtime import LoadedPlan
from smoothquant.artifacts.ports import ATTENTION_MASK, INPUT_IDS, LOGITS, PAST, POSITION_IDS, WRITE_INDICES


class Session:
    """A plan with the limits that it was built for."""

    def __init__(self, plan: LoadedPlan, limits: Limits) -> None:
        self.plan, self.gpu, self.limits = plan, plan.gpu, limits
        self.past = [port for port in plan.ports.values() if port.name.startswith(PAST)]

    def logits(self, ids: Tensor) -> Tensor:
        """The logits of all tokens, float32 (batch, tokens, vocab) on the CPU. ids: int64 (batch, tokens), within the
        limits."""
        found, end = torch.empty(*ids.shape, self.plan.ports[LOGITS].shape[-1]), 0
        for logits in Runs(self, len(ids)).prefill(ids):
            begin, end = end, end + logits.shape[1]
            found[:, begin:end] = logits
        return found


class Runs:
    """The runs of one batch of sequences. The attribute `tokens` counts the tokens of each sequence so far."""

    def __init__(self, session: Session, batch: int) -> None:
        self.session, self.batch, self.tokens = session, batch, 0
        self.device, limits = session.gpu.device, session.limits
        most = limits.cache + limits.chunk
        with session.gpu.use():
            self.cache: Cache | InPlaceCache
            if limits.capacity is None:
                self.cache = Cache(session.past, batch, most, limits.window, self.device)
                self._mask = torch.ones(batch * most, dtype=torch.int64, device=self.device)
            else:
                self.cache = InPlaceCache(session.past, batch, limits.capacity, self.device)
        self._size = 0  # tokens of the last run

    def prefill(self, ids: Tensor) -> Iterator[Tensor]:
        """Yield the logits of every chunk, as `run` returns them. ids: (batch, tokens)."""
        first = 0
        for size in self.session.limits.chunks(ids.shape[1]):
            yield self.run(ids[:, first : first + size])
            first += size

    def run(self, ids: Tensor) -> Tensor:
        """The logits of one run, (batch, tokens, vocab), after waiting for them. They hold until the next run.

        ids: (batch, tokens).
        """
        gpu, plan, tokens = self.session.gpu, self.session.plan, ids.shape[1]
        with gpu.use():
            if tokens != self._size:
                self._allocate(tokens)
            self._ids.copy_(ids)
            if ATTENTION_MASK in self._shapes:
                self._shapes[ATTENTION_MASK] = (self.batch, self.cache.cached + tokens)
            addresses = {**self._addresses, **self.cache.place(tokens)}
            plan.run(profile_of(tokens), {**self._shapes, **self.cache.shapes()}, addresses)
            self.cache.advance(tokens)
            self._counted.add_(tokens)
            self.tokens += tokens
        gpu.wait()
        return self._logits

    def _allocate(self, tokens: int) -> None:
        """Make the buffers for runs of so many tokens. The next one follows the tokens so far."""
        port, shape = self.session.plan.ports[LOGITS], (self.batch, tokens)
        self._size, self._ids = tokens, torch.empty(shape, dtype=torch.int64, device=self.device)
        self._logits = torch.empty(*shape, port.shape[-1], dtype=port.dtype, device=self.device)
        if self.session.limits.capacity is None:
            places = torch.arange(self.tokens, self.tokens + tokens, device=self.device)
            self._counted = places.expand(shape).contiguous()  # what says where the tokens stand, and moves with them
            inputs = {INPUT_IDS: self._ids, POSITION_IDS: self._counted, ATTENTION_MASK: self._mask}
        else:
            self._counted = torch.full((self.batch,), self.tokens, dtype=torch.int64, device=self.device)
            inputs = {INPUT_IDS: self._ids, WRITE_INDICES: self._counted}
        self._shapes = {name: tuple(tensor.shape) for name, tensor in inputs.items()}
        self._addresses = {name: tensor.data_ptr() for name, tensor in (inputs | {LOGITS: self._logits}).items()}


class CachedDecoding(Decoding):
    """One sequence under way. logits: the logits of its last token, float32 (vocab,)."""

    def __init__(self, session: Session, prompt: Sequence[int]) -> None:
        self._runs = Runs(session, 1)
        for logits in self._runs.prefill(torch.tensor([prompt], dtype=torch.int64)):
            self.logits = _last(logits)

    def step(self, token: int) -> None:
        """Append a token to the sequence and compute its logits."""
        self.logits = _last(self._runs.run(torch.tensor([[token]])))


def _last(logits: Tensor) -> numpy.ndarray:
    """A copy of the logits of the last token, float32 (vocab,). logits: (1, tokens, vocab)."""
    return logits[0, -1].to("cpu", torch.float32, copy=True).numpy()
