"""Use an engine on a Triton server like an engine on this machine. Its folder here gives the tokenizer and the limits.

Tokens go to the server and logits come back, by gRPC. The cache stays on the server
(`builders.serving.triton.config`). The packages tritonclient, grpcio and protobuf are needed.

Whatever a server answers, or does not, is a UserError: it may be another program that listens there, it may serve
another model under this name, and it may go away between two tokens.
"""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy

from builders.engine.generation import Decoding, GeneratingEngine
from builders.serving.triton.repository import DECODERS, model_name
from builders.tensorrt.record import STEP as TENSORRT
from builders.tensorrt.record import TensorRTInputs
from smoothquant.artifacts.ports import ATTENTION_MASK, INPUT_IDS, LOGITS, POSITION_IDS
from smoothquant.errors import UserError
from smoothquant.outputs import load_manifest
from smoothquant.packages import require

if TYPE_CHECKING:
    from torch import Tensor

CHUNK = 512  # the tokens of a request, unless the engine has a limit
TIMEOUT = 300.0  # seconds: TensorRT in Triton's ONNX Runtime compiles a model at its first request
DAY = 86_400  # seconds; gRPC takes a time without end for none
BRIEFLY = 10.0  # seconds, for what a server answers at once
PACKAGES = "tritonclient grpcio protobuf"  # not tritonclient[grpc], which would downgrade the other two
FLOATS = (numpy.float32, numpy.float16)  # of logits; tritonclient gives bfloat16 as float32
LONGEST_REASON = 300  # characters
SERVE = "smoothquant build ... --triton DIR, then start the server again"


class TritonEngine(GeneratingEngine):
    """An engine on a Triton server.

    folder: the engine's folder here; the server serves the engine under the folder's name. url: HOST:PORT of the
    server's gRPC service. timeout: the seconds that the server may take for a request. client: in place of
    tritonclient's own. Raises UserError if no server answers or it does not serve this engine.
    """

    def __init__(self, folder: str | Path, url: str, timeout: float = TIMEOUT, client: Any = None) -> None:
        if not 0 < timeout <= DAY:  # NaN fails too
            raise UserError(f"--timeout {timeout:g}", expected=f"a number of seconds above 0, at most {DAY}")
        self.folder, self.url, self.name, self.timeout = Path(folder), url, model_name(folder), timeout
        self.manifest = load_manifest(folder)
        if self.manifest.step not in DECODERS:
            raise UserError(f"{folder}: made by {self.manifest.step!r}", expected=f"{' or '.join(DECODERS)}")
        self.chunk, self._most = CHUNK, self.manifest.facts.max_positions + 2
        if self.manifest.step == TENSORRT:
            limits = self.manifest.inputs_as(TensorRTInputs).limits
            self.chunk, self._most = limits.chunk, limits.length
            if limits.window:
                self._most = min(self._most, 2 * limits.window + 1)  # the server cuts no cache
        os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # what it would print here, and log there, is in its errors
        logging.getLogger("grpc").setLevel(logging.CRITICAL)
        for module in ("grpc", "google.protobuf", "tritonclient"):  # tritonclient.grpc hides which one is missing
            require(module, "a Triton server is reached by tritonclient", PACKAGES)
        self.grpc = require("tritonclient.grpc", package=PACKAGES)
        self._connect(client)

    @property
    def longest(self) -> int:
        return self._most - 2  # the hidden position that a cache begins with, and the request that ends a sequence

    def logits(self, ids: Tensor) -> Tensor:
        """The logits of whole sequences without padding, float32 (batch, tokens, vocab). ids: int64 (batch, tokens)."""
        import torch

        rows = []
        for row in ids.tolist():
            with closing(Served(self)) as sequence:
                rows.append(numpy.concatenate(list(sequence.prefill(row))))
        return torch.from_numpy(numpy.stack(rows))

    def start(self, prompt: Sequence[int]) -> Served:
        """A sequence after its prompt. prompt: token ids."""
        with ExitStack() as undo:
            sequence = Served(self)
            undo.callback(sequence.close)
            for logits in sequence.prefill(prompt):
                sequence.logits = logits[-1]
            undo.pop_all()
        return sequence

    def _connect(self, client: Any) -> None:
        try:
            self.client = client or self.grpc.InferenceServerClient(self.url)
            ready = self.client.is_model_ready(self.name, client_timeout=BRIEFLY)
        except Exception as error:  # grpc raises errors of many classes
            raise UserError(
                f"{self.url}: no Triton server answers ({reason(error)})",
                expected="HOST:PORT of its gRPC service, whose default port is 8001",
                do="start it: tritonserver --model-repository DIR",
            ) from error
        if not ready:
            raise UserError(
                f"{self.url}: this server has no model {self.name!r}",
                expected="a repository that this engine was put into",
                do=SERVE,
            )


class Served(Decoding):
    """One sequence on the server. logits: the logits of its last token, float32 (vocab,)."""

    def __init__(self, engine: TritonEngine) -> None:
        self._engine, self._id, self._tokens = engine, secrets.randbits(63) | 1, 0

    def prefill(self, prompt: Sequence[int]) -> Iterator[numpy.ndarray]:
        """Yield the logits of every request, (tokens, vocab). The short request goes first: see `builders.tensorrt`."""
        chunk, first = self._engine.chunk, len(prompt) % self._engine.chunk
        starts = [0, *range(first, len(prompt), chunk)] if first else range(0, len(prompt), chunk)
        for start, end in zip(starts, [*starts[1:], len(prompt)], strict=True):
            yield self._request(prompt[start:end])

    def step(self, token: int) -> None:
        """Append a token to the sequence and compute its logits."""
        self.logits = self._request([token])[-1]

    def close(self) -> None:
        """Tell the server to forget the cache. A server that cannot be told forgets it by itself, after a while."""
        if self._tokens:
            with suppress(UserError):
                self._request([0], end=True)

    def _request(self, ids: Sequence[int], end: bool = False) -> numpy.ndarray:
        """The logits of these tokens, float32 (tokens, vocab). Raises UserError for an answer that is none."""
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
        timeout = min(BRIEFLY, self._engine.timeout) if end else self._engine.timeout
        try:
            found = self._engine.client.infer(
                self._engine.name,
                inputs,
                outputs=[grpc.InferRequestedOutput(LOGITS)],
                sequence_id=self._id,
                sequence_start=before == 0,
                sequence_end=end,
                client_timeout=timeout,
            )
        except Exception as error:  # grpc raises errors of many classes
            if "[StatusCode.DEADLINE_EXCEEDED]" in str(error):
                raise UserError(
                    f"{self._engine.url}: the server has not answered for {timeout:g} seconds",
                    do="see its log; if it is only slow, give a larger --timeout",
                ) from error
            raise UserError(f"{self._engine.url}: the server failed ({reason(error)})", do="see its log") from error
        return self._read(found, len(ids)).astype(numpy.float32)

    def _read(self, found: Any, tokens: int) -> numpy.ndarray:
        """The logits in an answer, (tokens, vocab). Raises UserError if there are none."""
        expected, said = (1, tokens, self._engine.manifest.facts.vocab_size), ""
        try:
            array = found.as_numpy(LOGITS)
            if array is None:
                said = "the server's answer holds no logits"
            elif array.dtype not in FLOATS or array.shape != expected:
                said = f"the server's logits are {array.dtype} of shape {list(array.shape)}"
        except Exception as error:  # of many classes: bytes that are too many, too few, or of no type
            said = f"the server's answer holds no logits ({reason(error)})"
        if said:
            raise UserError(
                f"{self._engine.url}: {said}",
                expected=f"float32 or float16 of shape {list(expected)}",
                do=f"see its log, and whether {self._engine.name!r} there is this engine: {SERVE}",
            )
        return array[0]


def reason(error: Exception) -> str:
    """What an error says, in one line that is not too long."""
    said = str(error).strip() or type(error).__name__
    return said.partition("\n")[0][:LONGEST_REASON]
