"""Run an engine folder in ONNX Runtime: logits of whole sequences, and generation with a KV cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy

from builders.engine.generation import reaches, tokens_to_keep
from builders.engine.slots import PieceDecoding, SeparateDecoding, SeparateSlots, ServableEngine, Slots
from builders.onnxruntime.grouped_slots import BufferDecoding, BufferSlots, GroupedSlots, InPlaceSlots
from builders.onnxruntime.providers import find_provider
from builders.onnxruntime.record import CPU, GROUPED, attention_of, provider_of
from builders.onnxruntime.session import check_body, check_in_place, first_feed, open_session
from smoothquant.artifacts.ports import (
    ATTENTION_MASK,
    INPUT_IDS,
    LOGITS,
    LOGITS_TO_KEEP,
    POSITION_IDS,
    PRESENT,
    past_of,
)
from smoothquant.errors import UserError
from smoothquant.machine import subnormals_as_zero
from smoothquant.outputs import load_manifest
from smoothquant.packages import require

if TYPE_CHECKING:
    from torch import Tensor


class OnnxRuntimeEngine(ServableEngine):
    """An engine folder or an ONNX export, opened in ONNX Runtime.

    manifest: the folder's manifest. provider: a name of `providers.PROVIDERS`; the default is the provider that the
    engine was built for, and the CPU for an export. threads: the number of threads; the default is the number of
    physical cores.
    """

    def __init__(self, folder: str | Path, provider: str | None = None, threads: int | None = None) -> None:
        self.folder = Path(folder)
        self.manifest = load_manifest(folder)
        check_body(self.folder, self.manifest.origin)
        self.provider = find_provider(provider or provider_of(self.manifest))
        onnx, attention = self.manifest.origin.onnx, attention_of(self.manifest)
        self.grouped, self.capacity = attention == GROUPED, onnx.capacity if onnx else None
        check_in_place(self.folder, self.manifest.origin, self.provider.name, attention)
        if self.grouped and self.provider.name != CPU:
            raise UserError(
                f"{self.folder}: its attention is an operator of ONNX Runtime that this tool runs on a processor",
                expected=f"the provider cpu, not {self.provider.name}",
                do="build an engine with --attention standard for other providers",
            )
        self.session = open_session(self.folder, provider=self.provider.name, threads=threads)

    @property
    def longest(self) -> int:
        return self.capacity or super().longest

    def check_length(self, tokens: int) -> None:
        """Raise UserError if a sequence of so many tokens does not fit into a cache that is written in place."""
        if self.capacity is not None and tokens > self.capacity:
            raise UserError(
                f"{self.folder}: a sequence of {tokens} tokens",
                expected=f"at most {self.capacity}, the capacity of its cache",
                do="export it with a larger --capacity, or give a smaller --length",
            )

    def logits(self, ids: Tensor) -> Tensor:
        """The logits of whole sequences without padding, float32 (batch, tokens, vocab). ids: int64 (batch, tokens)."""
        import torch

        self.check_length(ids.shape[1])
        feed = first_feed(self.session, ids.numpy())
        with subnormals_as_zero():
            return torch.from_numpy(self.session.run([LOGITS], feed)[0])

    def start(self, prompt: Sequence[int]) -> PieceDecoding:
        """A sequence after its prompt, which a processor reads in pieces, and a GPU whole. prompt: token ids."""
        if self.provider.name == CPU:
            return super().start(prompt)
        decoding = self.empty()
        decoding.append(prompt)
        return decoding

    def empty(self) -> PieceDecoding:
        """A sequence without tokens."""
        buffers = self._buffers(1, self.longest)
        return OnnxRuntimeDecoding(self) if buffers is None else BufferDecoding(buffers)

    def kept_tokens(self, length: int) -> int:
        """The most tokens in the cache of a sequence of so many. One buffer for all sequences keeps every token; one
        that is written in place has room for all that the graph can take."""
        return self.capacity or (length if self.grouped else super().kept_tokens(length))

    def slots(self, count: int, length: int) -> Slots:
        """Room for sequences. count: their number. length: the largest number of tokens of each."""
        return self._buffers(count, length) or SeparateSlots(count, length, lambda: OnnxRuntimeDecoding(self))

    def _buffers(self, count: int, length: int) -> BufferSlots | None:
        """Room for sequences in one buffer; None for a graph that writes into none."""
        if self.capacity is not None:
            return InPlaceSlots(self.session, count, min(length, self.capacity))
        return GroupedSlots(self.session, count, length) if self.grouped else None


class OnnxRuntimeDecoding(SeparateDecoding):
    """One sequence under way. Its cache stays inside the runtime.

    logits: the logits of its last token, float32 (vocab,).
    """

    def __init__(self, engine: OnnxRuntimeEngine) -> None:
        self._engine = engine
        self.session = engine.session
        self._device = engine.provider.device
        self._value = require("onnxruntime").OrtValue.ortvalue_from_numpy
        present = [value.name for value in self.session.get_outputs() if value.name.startswith(PRESENT)]
        self._ports = [(name, past_of(name)) for name in present]
        feed = first_feed(engine.session, numpy.zeros((1, 0), dtype=numpy.int64))
        self._cache = [self._value(feed[past]) for _, past in self._ports]
        self._window = engine.manifest.facts.cache_window
        self._binding = self.session.io_binding()
        overridable = self.session.get_overridable_initializers()
        self._keeps = any(value.name == LOGITS_TO_KEEP for value in overridable)  # earlier exports have no such input
        self._tokens = self._cached = 0

    def append(self, tokens: Sequence[int], keep: int = 1) -> numpy.ndarray:
        """Append tokens. Returns logits, float32 (kept tokens, vocab), of the last `keep` of them; of all for 0."""
        binding, ids = self._binding, numpy.array([tokens], dtype=numpy.int64)
        positions = numpy.arange(self._tokens, self._tokens + ids.shape[1], dtype=numpy.int64)[None]
        self._tokens += ids.shape[1]
        self._cached += ids.shape[1]
        binding.bind_cpu_input(INPUT_IDS, ids)
        binding.bind_cpu_input(POSITION_IDS, positions)
        binding.bind_cpu_input(ATTENTION_MASK, numpy.ones((1, self._cached), dtype=numpy.int64))
        if self._keeps:
            binding.bind_ortvalue_input(LOGITS_TO_KEEP, self._value(numpy.array([keep], dtype=numpy.int64)))
        binding.bind_output(LOGITS)
        for (present, past), value in zip(self._ports, self._cache, strict=True):
            binding.bind_ortvalue_input(past, value)
            binding.bind_output(present, self._device)
        with subnormals_as_zero():
            self.session.run_with_iobinding(binding)
        logits, *self._cache = binding.get_outputs()
        kept = tokens_to_keep(self._cached, self._window)
        if kept < self._cached:
            self._cached = kept
            self._cache = [self._value(value.numpy()[:, :, -kept:]) for value in self._cache]
        kept_logits = logits.numpy()[0][-keep:]
        self.logits = kept_logits[-1]
        return kept_logits

    def beginning(self, tokens: int) -> OnnxRuntimeDecoding | None:
        """Another sequence, of the first tokens of this one; None if a window has made it forget some that are needed.

        tokens: their number, at least one.
        """
        forgotten = self._tokens - self._cached
        if reaches(forgotten, tokens, self._window):
            return None
        other = OnnxRuntimeDecoding(self._engine)
        other._tokens, other._cached = tokens, tokens - forgotten
        other._cache = [self._value(value.numpy()[:, :, : tokens - forgotten]) for value in self._cache]
        return other
