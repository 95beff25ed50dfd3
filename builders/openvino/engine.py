"""Run an engine folder in OpenVINO: logits of whole sequences, and generation with a KV cache."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy

from builders.engine.generation import PIECE, reaches, tokens_to_keep
from builders.engine.kernels import IntegerKernels, check_kernels
from builders.engine.slots import SeparateDecoding, SeparateSlots, ServableEngine, Slots
from builders.openvino.graph import CompiledGraph, compile_graph, refused
from builders.openvino.package import require_openvino, version_of
from builders.openvino.record import OpenVinoInputs, OpenVinoResults
from smoothquant.artifacts.manifest import Manifest
from smoothquant.artifacts.ports import ATTENTION_MASK, INPUT_IDS, LOGITS, LOGITS_TO_KEEP, POSITION_IDS
from smoothquant.errors import UserError
from smoothquant.machine import cpu_flags, int8_flag, subnormals_as_zero
from smoothquant.outputs import load_manifest

if TYPE_CHECKING:
    from torch import Tensor


class OpenVinoEngine(ServableEngine):
    """An engine folder, opened in OpenVINO.

    manifest: the folder's manifest. threads: the number of threads; the default is the number of physical cores.

    Raises UserError for an engine that was built for instructions which this processor lacks, or whose products do not
    all run in INT8 in this version of OpenVINO.
    """

    def __init__(self, folder: str | Path, threads: int | None = None) -> None:
        self.folder = Path(folder)
        self.manifest = load_manifest(folder)
        check_instructions(self.folder, self.manifest)
        self.graph = compile_graph(self.folder, threads)
        check_version(self.graph, self.manifest)

    def logits(self, ids: Tensor) -> Tensor:
        """The logits of whole sequences without padding, float32 (batch, tokens, vocab). ids: int64 (batch, tokens)."""
        import torch

        return torch.from_numpy(OpenVinoRequest(self.graph, len(ids)).run(ids.numpy(), keep=0))

    def empty(self) -> OpenVinoDecoding:
        """A sequence without tokens."""
        return OpenVinoDecoding(self)

    def slots(self, count: int, length: int) -> Slots:
        """Room for sequences. count: their number. length: the largest number of tokens of each."""
        return SeparateSlots(count, length, self.empty, multiple=PIECE)  # its sums go by the pieces


class OpenVinoRequest:
    """Sequences of one length under way, with a cache of their own. tokens: how many they have; cached: how many of
    these are in the cache."""

    def __init__(self, graph: CompiledGraph, batch: int) -> None:
        self.graph, self.request, self.tokens, self.cached = graph, graph.model.create_infer_request(), 0, 0
        self._tensor = require_openvino().Tensor
        for state in self.request.query_state():
            _, heads, _, channels = state.state.shape
            state.state = self._tensor(state.state.element_type, [batch, heads, 0, channels])

    def run(self, ids: numpy.ndarray, keep: int) -> numpy.ndarray:
        """Append tokens. Returns logits, float32 (batch, kept tokens, vocab).

        ids: int64 (batch, tokens). keep: the number of last tokens whose logits are computed; 0 for all.
        """
        batch, tokens = ids.shape
        positions = numpy.arange(self.tokens, self.tokens + tokens, dtype=numpy.int64)
        self.tokens, self.cached = self.tokens + tokens, self.cached + tokens
        feed = {
            INPUT_IDS: numpy.ascontiguousarray(ids),
            POSITION_IDS: numpy.tile(positions, (batch, 1)),
            ATTENTION_MASK: numpy.ones((batch, self.cached), dtype=numpy.int64),
        }
        if self.graph.keeps:
            feed[LOGITS_TO_KEEP] = numpy.array([keep], dtype=numpy.int64)
        try:
            with subnormals_as_zero():
                self.request.infer(feed, share_inputs=True)
        except RuntimeError as error:
            raise refused(self.graph.folder, error) from error
        return self.request.get_tensor(LOGITS).data.copy()

    def cut(self, kept: int) -> None:
        """Forget all but the newest tokens of the cache. kept: their number."""
        if kept < self.cached:
            self.cached = kept
            for state in self.request.query_state():
                state.state = self._tensor(numpy.ascontiguousarray(state.state.data[:, :, -kept:]))

    def take(self, other: OpenVinoRequest, tokens: int) -> None:
        """Begin with the first tokens of another request. tokens: their number."""
        forgotten = other.tokens - other.cached
        theirs = {state.name: state.state for state in other.request.query_state()}
        for state in self.request.query_state():
            first = theirs[state.name].data[:, :, : tokens - forgotten]
            state.state = self._tensor(numpy.ascontiguousarray(first))
        self.tokens, self.cached = tokens, tokens - forgotten


class OpenVinoDecoding(SeparateDecoding):
    """One sequence under way. Its cache stays inside the runtime.

    logits: the logits of its last token, float32 (vocab,).
    """

    def __init__(self, engine: OpenVinoEngine) -> None:
        self._engine = engine
        self._request = OpenVinoRequest(engine.graph, 1)
        self._window = engine.manifest.facts.cache_window

    def append(self, tokens: Sequence[int], keep: int = 1) -> numpy.ndarray:
        """Append tokens. Returns logits, float32 (kept tokens, vocab), of the last `keep` of them; of all for 0."""
        [logits] = self._request.run(numpy.array([tokens], dtype=numpy.int64), keep)
        self._request.cut(tokens_to_keep(self._request.cached, self._window))
        self.logits = logits[-1]
        return logits[-keep:]

    def beginning(self, tokens: int) -> OpenVinoDecoding | None:
        """Another sequence, of the first tokens of this one; None if a window has made it forget some that are needed.

        tokens: their number, at least one.
        """
        forgotten = self._request.tokens - self._request.cached
        if reaches(forgotten, tokens, self._window):
            return None
        other = OpenVinoDecoding(self._engine)
        other._request.take(self._request, tokens)
        return other


def check_instructions(folder: Path, manifest: Manifest) -> None:
    """Raise UserError if this processor lacks the integer instructions that an engine was built for.

    Where a processor does not tell its features, nothing is known and nothing is assumed."""
    built, flags = manifest.inputs_as(OpenVinoInputs).instructions, cpu_flags()
    if built and flags and built not in flags:
        raise UserError(
            f"{folder}: built for a processor with {built}; this one has {int8_flag(flags) or 'no such instructions'}",
            expected=f"a processor with {built}",
            do="run smoothquant build openvino again, on this machine",
        )


def check_version(graph: CompiledGraph, manifest: Manifest) -> None:
    """Raise UserError if another version of OpenVINO than that of the build runs fewer products in INT8."""
    built, found = manifest.inputs_as(OpenVinoInputs).openvino, version_of(require_openvino())
    if found != built:
        quantized = manifest.results_as(OpenVinoResults).kernels.quantized
        kernels = IntegerKernels(sum(product.integer for product in graph.products()), quantized)
        check_kernels(
            graph.folder,
            f"OpenVINO {found}",
            kernels,
            f"use OpenVINO {built}, which built it, in a virtual environment of its own",
        )
