"""A gRPC server in place of Triton's, that answers as a test says: on the wire, with Triton's own messages."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import grpc
import numpy
from tritonclient.grpc import service_pb2

SERVICE = "inference.GRPCInferenceService"

Answer = Callable[[Any, grpc.ServicerContext], Any]  # the request and its context -> the answer: a message, or bytes


class Script:
    """The answers of a server to requests for logits, in their order; the last one stays.

    ends: of each request, whether it ended its sequence. stop: ends the server.
    """

    def __init__(self, *answers: Answer, ready: bool = True) -> None:
        self.answers, self.ready = list(answers), ready
        self.ends: list[bool] = []
        self.stop: Callable[[], object] = lambda: None
        self.ended = threading.Event()

    def infer(self, request: Any, context: grpc.ServicerContext) -> Any:
        self.ends.append(request.parameters["sequence_end"].bool_param)
        return self.answers[min(len(self.ends), len(self.answers)) - 1](request, context)


@contextmanager
def serving(script: Script) -> Iterator[str]:
    """HOST:PORT of a server with this script."""

    def method(message: Any, behaviour: Callable) -> grpc.RpcMethodHandler:
        def encoded(answer: Any) -> bytes:
            return answer if isinstance(answer, bytes) else answer.SerializeToString()

        return grpc.unary_unary_rpc_method_handler(behaviour, message.FromString, encoded)

    ready = service_pb2.ModelReadyResponse(ready=script.ready)
    methods = {
        "ModelReady": method(service_pb2.ModelReadyRequest, lambda request, context: ready),
        "ModelInfer": method(service_pb2.ModelInferRequest, script.infer),
    }
    server = grpc.server(ThreadPoolExecutor(4))
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, methods),))
    port = server.add_insecure_port("127.0.0.1:0")
    script.stop = lambda: server.stop(0)
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        script.ended.set()
        server.stop(0).wait()


# -- answers -----------------------------------------------------------------------------------------------------------


def logits(
    vocabulary: int = 288, *, name: str = "logits", datatype: str = "FP32", fill: float = 0.0, rows: int = 0
) -> Answer:
    """Logits of the shape that was asked for. rows: how many too many."""

    def answer(request: Any, context: grpc.ServicerContext) -> Any:
        shape = [1, tokens(request) + rows, vocabulary]
        dtype = numpy.int64 if datatype == "INT64" else numpy.float32
        return tensor(name, datatype, shape, numpy.full(shape, fill).astype(dtype).tobytes())

    return answer


def content(cut: Callable[[bytes], bytes], datatype: str = "FP32") -> Answer:
    """Logits whose bytes are others than the shape says."""

    def answer(request: Any, context: grpc.ServicerContext) -> Any:
        shape = [1, tokens(request), 288]
        return tensor("logits", datatype, shape, cut(numpy.zeros(shape, numpy.float32).tobytes()))

    return answer


def refusal(code: grpc.StatusCode, said: str) -> Answer:
    return lambda request, context: context.abort(code, said)


def tokens(request: Any) -> int:
    """The number of tokens that a request is about."""
    return next(int(given.shape[1]) for given in request.inputs if given.name == "input_ids")


def tensor(name: str, datatype: str, shape: list[int], raw: bytes) -> Any:
    found = service_pb2.ModelInferResponse(model_name="m", model_version="1")
    found.outputs.add(name=name, datatype=datatype, shape=shape)
    found.raw_output_contents.append(raw)
    return found
