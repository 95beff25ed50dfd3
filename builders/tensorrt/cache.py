"""The KV cache of one batch: the buffers that a run reads and those that it writes.

grown      two sets of buffers, which swap
in place   one set, of the capacity of the graph: TensorRT's KVCacheUpdate writes where it reads, and wants past and
           present at one address. Shapes and addresses are the same in every run. What no token has written yet is
           masked, not left out, so buffers begin with zeros

Of a cache that grows, a run reads the past, (batch, kv_heads, past, head_dim) for the keys and for the values of each
layer, and writes past and present together. It cannot write where it reads, so two sets of buffers swap, and with them
their addresses, which are looked up once. A set grows just before it is written. Growing copies nothing, since the run
writes the whole set.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from builders.engine.generation import tokens_to_keep
from builders.nvidia.profiles import Shape
from builders.tensorrt.runtime import Port
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
        self._shapes = {name: tuple(buffer.shape) for name, buffer in self._buffers.items()}
        self._addresses = _places(self._buffers, self._buffers)

    def shapes(self) -> Mapping[str, Shape]:
        """The shape of every cache input, which is the same in every run."""
        return self._shapes

    def place(self, tokens: int) -> Mapping[str, int]:
        """The address of every cache input and output, for a run of `tokens` further tokens.

        Raises UserError if these do not fit: TensorRT would write beyond the buffer.
        """
        total = self.cached + tokens
        if total > self._capacity:
            raise UserError(
                f"a sequence of {total} tokens", expected=f"at most {self._capacity}, its room in the cache"
            )
        return self._addresses

    def advance(self, tokens: int) -> None:
        """Count the tokens of the run that was put on the stream."""
        self.cached += tokens


Buffers = dict[str, Tensor]  # by the name of the cache's input


class Cache:
    """The two sets of buffers.

    past: all cache inputs of the engine. batch: the number of sequences. most: the tokens that a set may have to hold.
    window: the tokens that any layer looks back; None for all. The attribute `cached` counts the tokens in the cache;
    `read` and `write` hold the buffers of the next run.
    """

    def __init__(self, past: Sequence[Port], batch: int, most: int, window: int | None, device: torch.device) -> None:
        self.cached = 0
        self._past, self._batch, self._most, self._window, self._device = past, batch, most, window, device
        self._alike: dict[Shape, list[str]] = {}  # names of the inputs of one shape
        for port in past:
            self._alike.setdefault(self._shape(port, 0), []).append(port.name)
        self.read, self.write = self._allocate(1), self._allocate(1)
        self._addresses: dict[str, int] = {}
        self._swapped: dict[str, int] = {}
        self._look_up()

    def shapes(self) -> Mapping[str, Shape]:
        """The shape of every cache input of the next run."""
        found: dict[str, Shape] = {}
        for (batch, heads, _, channels), names in self._alike.items():
            found |= dict.fromkeys(names, (batch, heads, self.cached, channels))
        return found

    def place(self, tokens: int) -> Mapping[str, int]:
        """Make room for a run of `tokens` further tokens. Returns the address of every cache input and output."""
        total = self.cached + tokens
        if total > self._capacity:
            self.write = self._allocate(max(total, min(2 * total, self._most)))
            self._look_up()
        return self._addresses

    def advance(self, tokens: int) -> None:
        """Make the output of the run that was put on the stream the past of the next run.

        Only as many tokens stay as any layer looks back.
        """
        self.read, self.write = self.write, self.read
        self._addresses, self._swapped = self._swapped, self._addresses
        self.cached += tokens
        kept = tokens_to_keep(self.cached, self._window)
        if kept < self.cached:
            for port in self._past:
                whole = _first(self.read[port.name], self._shape(port, self.cached))
                self.read[port.name] = whole[:, :, self.cached - kept :].contiguous().view(-1)
            self.cached = kept
            self._look_up()

    @property
    def _capacity(self) -> int:
        port = self._past[0]
        return self.write[port.name].numel() // torch.Size(self._shape(port, 1)).numel()

    def _look_up(self) -> None:
        """Look up the addresses of the next run and of the run behind it."""
        self._addresses, self._swapped = _places(self.read, self.write), _places(self.write, self.read)

    def _allocate(self, tokens: int) -> Buffers:
        return {
            port.name: torch.empty(torch.Size(self._shape(port, tokens)).numel(), dtype=port.dtype, device=self._device)
            for port in self._past
        }

    def _shape(self, port: Port, tokens: int) -> Shape:
        return (self._batch, port.shape[1], tokens, port.shape[3])


def _places(read: Buffers, write: Buffers) -> dict[str, int]:
    past = {name: buffer.data_ptr() for name, buffer in read.items()}
    return past | {PRESENT + name.removeprefix(PAST): buffer.data_ptr() for name, buffer in write.items()}


def _first(buffer: Tensor, shape: Sequence[int]) -> Tensor:
    return buffer[: torch.Size(shape).numel()].view(*shape)
