"""An engine on a Triton server, used like one that is here. The folder gives its tokenizer and its limits.

Tokens go there and logits come back, by gRPC; the cache stays on the server (`builders.serving.triton.config`). Needs
tritonclient[grpc].
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from builders.engine.generation import Decoding, GeneratingEngine
from builders.serving.triton.repository import DECODERS, model_name
from builders.tensorrt.record import STEP as TENSORRT
from builders.tensorrt.record import TensorRTInputs
from smoothquant.artifacts.ports import ATTENTION_MASK, INPUT_IDS, LOGITS, POSITION_IDS
from smoothquant.errors import UserError
from smoothquant.packages import require
from smoothquant.workspace import load_manifest

CHUNK = 512  # tokens of a prompt in a request, where the engine does not say


class TritonEngine(GeneratingEngine):
    """folder: the engine's, which the server serves under its name. url: HOST:PORT of its gRPC service.

    Raises UserError if the server is not there or does not serve this engine.
    """

    def __init__(self, folder: str | Path, url: str, client: Any = None) -> None:
        self.folder, self.url, self.name = Path(folder), url, model_name(folder)
        self.manifest = load_manifest(folder)
        if self.manifest.step not in DECODERS:
            raise UserError(f"{folder}: made by {self.manifest.step!r}", expected=f"{' or '.join(DECODERS)}")
        self.chunk, self._most = CHUNK, self.manifest.facts.max_positions + 2
        if self.manifest.step == TENSORRT:
            limits = self.manifest.inputs_as(TensorRTInputs).limits
            self.chunk, self._most = limits.chunk, limits.length
            if limits.window:
                self._most = min(self._most, 2 * limits.window + 1)  # the server cuts no cache
        self.grpc = require("tritonclient.grpc", "a Triton server is reached by tritonclient", "tritonclient[grpc]")
        self.client = client or self.grpc.InferenceServerClient(url)
        self._check()

    @property
    def longest(self) -> int:
        return self._most - 2  # the hidden position that a cache begins with, and the request that ends a sequence

    def logits(self, ids: Tensor) -> Tensor:
        """ids: (batch, tokens) int64, whole sequences without padding; returns float32 (batch, tokens, vocab)."""
        rows = []
        for row in ids.tolist():
            sequence = Served(self)
            rows.append(torch.cat(list(sequence.prefill(row)), dim=0))
            sequence.close()
        return torch.stack(rows)

    def start(self, prompt: Sequence[int]) -> Served:
        """Run a prompt."""
        sequence = Served(self)
        for logits in sequence.prefill(prompt):
            sequence.logits = logits[-1]
        return sequence

    def _check(self) -> None:
        try:
            ready = self.client.is_model_ready(self.name)
        except Exception as error:  # grpc's, of many kinds
            reason = str(error).partition("\n")[0]
            raise UserError(
                f"{self.url}: no Triton server answers ({reason})",
                expected="HOST:PORT of its gRPC service, port 8001 unless it was told otherwise",
                do="start it: tritonserver --model-repository DIR",
            ) from error
        if not ready:
            raise UserError(
                f"{self.url}: serves no model {self.name!r}",
                expected="a repository that this engine was put into",
                do="smoothquant build ... --triton DIR, then start the server again",
            )


class Served(Decoding):
    """One sequence on the server. logits: (vocab,) float32, of the last token."""

    def __init__(self, engine: TritonEngine) -> None:
        self._engine, self._id, self._tokens = engine, secrets.randbits(63) | 1, 0

    def prefill(self, prompt: Sequence[int]) -> Iterator[Tensor]:
        """Yields the logits of every request, (tokens, vocab). The short one goes first: see `builders.tensorrt`."""
        chunk, first = self._engine.chunk, len(prompt) % self._engine.chunk
        starts = [0, *range(first, len(prompt), chunk)] if first else range(0, len(prompt), chunk)
        for start, end in zip(starts, [*starts[1:], len(prompt)], strict=True):
            yield self._request(prompt[start:end])

    def step(self, token: int) -> None:
        """Append a token."""
        self.logits = self._request([token])[-1]

    def close(self) -> None:
        """Have the server forget the cache."""
        if self._tokens:
            self._request([0], end=True)

    def _request(self, ids: Sequence[int], end: bool = False) -> Tensor:
        grpc, before = self._engine.grpc, self._tokens
        self._tokens += len(ids)
        mask = numpy.ones((1, 1 + self._tokens), dtype=numpy.int64)
        mask[0, 0] = 0  # the position that the cache begins with
        places = numpy.zeros(len(ids)) if end else numpy.arange(before, self._tokens)
        arrays = {
            INPUT_IDS: numpy.array([ids], dtype=numpy.int64),
            ATTENTION_MASK: mask,
            POSITION_IDS: places.astype(numpy.int64)[None],
        }
        inputs = []
        for name, array in arrays.items():
            inputs.append(grpc.InferInput(name, list(array.shape), "INT64"))
            inputs[-1].set_data_from_numpy(array)
        try:
            found = self._engine.client.infer(
                self._engine.name,
                inputs,
                outputs=[grpc.InferRequestedOutput(LOGITS)],
                sequence_id=self._id,
                sequence_start=before == 0,
                sequence_end=end,
            )
        except grpc.InferenceServerException as error:
            raise UserError(f"{self._engine.url}: the server failed ({error.message()})", do="see its log") from error
        return torch.from_numpy(found.as_numpy(LOGITS)[0].astype(numpy.float32))
