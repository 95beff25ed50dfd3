"""The KV cache of one batch: the buffers that a run reads and those that it writes.

grown      two sets of buffers, which swap
in place   one set, of the capacity of the graph: TensorRT's KVCacheUpdate writes where it reads, and wants past and
           present at one address. Shapes and addresses are the same in every run. What no token has written yet is
           masked, not left out, so buffers begin with zeros

Of a cache that grows, a run reads the past, (batch, kv_heads, past, head_dim) for the keys and for the values of each
layer, and writes past and present together. It cannot write where it reads, so two sets of buffers swap. A set grows
just before it is written. Growing copies nothing, since the run writes the whole set.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from builders.engine.generation import tokens_to_keep
from builders.tensorrt.runtime import Binding, Port
from smoothquant.artifacts.ports import PAST, PRESENT
from smoothquant.errors import UserError


class InPlaceCache:
    """The set of buffers that is written in place.

    past: all cache inputs of the engine. batch: the number of sequences. capacity: the tokens of a buffer. The
    attribute `cached` counts the tokens in the cache.
    """

    def __init__(self, past: Sequence[Port], batch: int, capacity: int, device: torch.device) -> None:
        self.cached, self._capacity = 0, capacity
        self._buffers = {
            port.name: torch.zeros((batch, *port.shape[1:]), dtype=port.dtype, device=device) for port in past
        }

    def bindings(self, tokens: int) -> Iterator[tuple[str, Binding]]:
        """Yield the name and buffer of every cache input and output, for a run of `tokens` further tokens.

        Raises UserError if these do not fit: TensorRT would write beyond the buffer.
        """
        total = self.cached + tokens
        if total > self._capacity:
            raise UserError(
                f"a sequence of {total} tokens", expected=f"at most {self._capacity}, its room in the cache"
            )
        for name, buffer in self._buffers.items():
            for port in (name, PRESENT + name.removeprefix(PAST)):
                yield port, Binding(tuple(buffer.shape), buffer)

    def advance(self, tokens: int) -> None:
        """Count the tokens of the run that was put on the stream."""
        self.cached += tokens


class Cache:
    """The two sets of buffers.

    past: all cache inputs of the engine. batch: the number of sequences. most: the tokens that a set may have to hold.
    window: the tokens that any layer looks back; None for all. The attribute `cached` counts the tokens in the cache.
    """

    def __init__(self, past: Sequence[Port], batch: int, most: int, window: int | None, device: torch.device) -> None:
        self.cached = 0
        self._past, self._batch, self._most, self._window, self._device = past, batch, most, window, device
        self._read, self._write = self._allocate(1), self._allocate(1)

    def bindings(self, tokens: int) -> Iterator[tuple[str, Binding]]:
        """Yield the name and buffer of every cache input and output, for a run of `tokens` further tokens."""
        total = self.cached + tokens
        if total > self._capacity:
            self._write = self._allocate(max(total, min(2 * total, self._most)))
        for port in self._past:
            yield port.name, Binding(self._shape(port, self.cached), self._read[port.name])
            present = PRESENT + port.name.removeprefix(PAST)
            yield present, Binding(self._shape(port, total), self._write[port.name])

    def advance(self, tokens: int) -> None:
        """Make the output of the run that was put on the stream the past of the next run.

        Only as many tokens stay as any layer looks back.
        """
        self._read, self._write = self._write, self._read
        self.cached += tokens
        kept = tokens_to_keep(self.cached, self._window)
        if kept < self.cached:
            for port in self._past:
                shape = self._shape(port, self.cached)
                whole = _first(self._read[port.name], shape)
                self._read[port.name] = whole[:, :, self.cached - kept :].contiguous().view(-1)
            self.cached = kept

    @property
    def _capacity(self) -> int:
        port = self._past[0]
        return self._write[port.name].numel() // torch.Size(self._shape(port, 1)).numel()

    def _allocate(self, tokens: int) -> dict[str, Tensor]:
        return {
            port.name: torch.empty(torch.Size(self._shape(port, tokens)).numel(), dtype=port.dtype, device=self._device)
            for port in self._past
        }

    def _shape(self, port: Port, tokens: int) -> tuple[int, ...]:
        return (self._batch, port.shape[1], tokens, port.shape[3])


def _first(buffer: Tensor, shape: Sequence[int]) -> Tensor:
    return buffer[: torch.Size(shape).numel()].view(*shape)
