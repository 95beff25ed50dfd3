"""A stand-in for a Triton server: sequences with implicit state, as triton-inference-server/core has them.

What is followed, by its sources (sequence_state.cc, sequence_batch_scheduler.cc, 2026): a config is checked by
Triton's own protobuf; a state begins with its initial_state, whose dimensions must be given and agree with the state's;
a request needs a sequence id, and a start before anything else; tensors must fit the declared dims; what was written to
a state's output is its input at the next request, whatever its shape; the end forgets it. ONNX Runtime computes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
from google.protobuf import text_format
from tritonclient import grpc
from tritonclient.grpc import model_config_pb2

from builders.onnxruntime.session import open_session
from smoothquant.machine import subnormals_as_zero

NUMPY = {"TYPE_FP32": numpy.float32, "TYPE_FP16": numpy.float16, "TYPE_INT64": numpy.int64, "TYPE_INT8": numpy.int8}


def parse(text: str) -> Any:
    """config.pbtxt by Triton's own message; an unknown or misplaced field is an error."""
    return text_format.Parse(text, model_config_pb2.ModelConfig())


def dtype(code: int) -> Any:
    return NUMPY[model_config_pb2.DataType.Name(code)]


def fits(shape: tuple[int, ...], dims: Any) -> bool:
    return len(shape) == len(dims) and all(dim in (-1, size) for size, dim in zip(shape, dims, strict=True))


class Result:
    def __init__(self, arrays: dict[str, numpy.ndarray]) -> None:
        self.arrays = arrays

    def as_numpy(self, name: str) -> numpy.ndarray:
        return self.arrays[name]


class Server:
    """One model, in place of tritonclient's InferenceServerClient. graph: a folder with the model.onnx that computes.

    live: sequences that the server remembers; requests: tokens of every request.
    """

    def __init__(self, model: Path, graph: Path) -> None:
        self.name, self.config = model.name, parse((model / "config.pbtxt").read_text())
        assert self.config.max_batch_size == 0
        self.batching = self.config.sequence_batching
        for state in self.batching.state:
            [initial] = state.initial_state
            assert initial.name
            assert initial.data_type == state.data_type
            assert initial.zero_data
            assert fits(tuple(initial.dims), state.dims)
            assert list(initial.dims) == [1 if dim == -1 else dim for dim in state.dims]
            assert not state.use_same_buffer_for_input_output
        self.session = open_session(graph)
        self.live: dict[int, dict[str, numpy.ndarray]] = {}
        self.requests: list[int] = []

    def is_model_ready(self, name: str, client_timeout: float) -> bool:
        return name == self.name

    def infer(
        self,
        name: str,
        inputs: list,
        outputs: list,
        sequence_id: int,
        sequence_start: bool,
        sequence_end: bool,
        client_timeout: float,
    ) -> Result:
        assert name == self.name
        if not 0 < sequence_id < 2**64:
            raise grpc.InferenceServerException("must specify a non-zero or non-empty correlation ID")
        if sequence_start:
            self.live[sequence_id] = {
                state.input_name: numpy.zeros(list(state.initial_state[0].dims), dtype(state.data_type))
                for state in self.batching.state
            }
            assert len(self.live) <= self.batching.oldest.max_candidate_sequences
        if sequence_id not in self.live:
            raise grpc.InferenceServerException("must specify the START flag on the first request of the sequence")
        states, feed = self.live[sequence_id], {}
        for tensor in inputs:
            given = next(declared for declared in self.config.input if declared.name == tensor.name())
            assert fits(tuple(tensor.shape()), given.dims), f"{tensor.name()} {tensor.shape()}"
            content = tensor._get_content()
            feed[tensor.name()] = numpy.frombuffer(content, dtype(given.data_type)).reshape(tensor.shape())
        assert {tensor.name for tensor in self.config.input} == set(feed)
        self.requests.append(feed["input_ids"].shape[1])
        names = [output.name for output in self.session.get_outputs()]
        with subnormals_as_zero():
            found = dict(zip(names, self.session.run(names, {**feed, **states}), strict=True))
        for state in self.batching.state:
            written = found[state.output_name]
            assert fits(written.shape, state.dims)
            states[state.input_name] = written
        if sequence_end:
            del self.live[sequence_id]
        asked = {output.name() for output in outputs}
        declared = {output.name: output.dims for output in self.config.output}
        assert all(fits(found[name].shape, declared[name]) for name in asked)
        return Result({name: found[name] for name in asked})
