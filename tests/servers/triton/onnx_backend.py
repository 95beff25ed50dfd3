"""Stands in for Triton's onnxruntime backend, and for its tensorrt backend: `BACKENDS/NAME/model.py`.

ONNX Runtime computes. A plan of these tests is the note of a stand-in for TensorRT (`tests.builders.tensorrt.fake`): it
names the graph, and the shapes that the profiles take.

Triton's Python backend passes the initial state of a sequence but keeps no state, so this keeps it, by correlation id.
Like the real backends it refuses a config.pbtxt whose tensors are not the graph's.
"""

import json
from pathlib import Path
from typing import Any

import numpy
import onnxruntime
import triton_python_backend_utils as pb

TYPES = {"TYPE_FP32": "tensor(float)", "TYPE_FP16": "tensor(float16)", "TYPE_INT64": "tensor(int64)"}
START, END = 1, 2  # flags of a request


class TritonPythonModel:
    """The one instance of a model; Triton calls its methods."""

    def initialize(self, args: dict[str, str]) -> None:
        config, folder = json.loads(args["model_config"]), Path(args["model_repository"], args["model_version"])
        graph, self.profiles = folder / "model.onnx", []
        if config["backend"] == "tensorrt":
            note = json.loads((folder / "model.plan").read_bytes().partition(b"plan ")[2])
            graph, self.profiles = Path(note["path"]), note["profiles"]
        options = onnxruntime.SessionOptions()
        options.add_session_config_entry("session.set_denormal_as_zero", "1")  # as our engines do
        self.session = onnxruntime.InferenceSession(graph, options)
        self.states: dict[int, dict[str, numpy.ndarray]] = {}
        states = config["sequence_batching"]["state"]
        self.written = {state["output_name"]: state["input_name"] for state in states}
        self.outputs = [output["name"] for output in config["output"]]
        of_states = [[state | {"name": state[key]} for state in states] for key in ("input_name", "output_name")]
        check("inputs", [*config["input"], *of_states[0]], self.session.get_inputs())
        check("outputs", [*config["output"], *of_states[1]], self.session.get_outputs())

    def execute(self, requests: list[Any]) -> list[Any]:
        return [self._respond(request) for request in requests]

    def _respond(self, request: Any) -> Any:
        feeds = {}
        for tensor in self.session.get_inputs():
            given = pb.get_input_tensor_by_name(request, tensor.name)
            if given is not None:
                feeds[tensor.name] = given.as_numpy()
        sequence, flags = request.correlation_id(), request.flags()
        if not flags & START:
            feeds |= self.states[sequence]
        if self.profiles and not any(fits(feeds, profile) for profile in self.profiles):
            shapes = {name: array.shape for name, array in feeds.items()}
            return pb.InferenceResponse(error=pb.TritonError(f"no optimization profile takes {shapes}"))
        names = [*self.outputs, *self.written]
        found = dict(zip(names, self.session.run(names, feeds), strict=True))
        self.states[sequence] = {past: found[present] for present, past in self.written.items()}
        if flags & END:
            del self.states[sequence]
        return pb.InferenceResponse([pb.Tensor(name, numpy.ascontiguousarray(found[name])) for name in self.outputs])


def check(what: str, declared: list[dict], tensors: list[Any]) -> None:
    """Raise TritonModelException if a config declares other tensors than the graph has."""
    theirs = {tensor["name"]: (TYPES.get(tensor["data_type"]), list(map(int, tensor["dims"]))) for tensor in declared}
    ours = {
        tensor.name: (tensor.type, [size if isinstance(size, int) else -1 for size in tensor.shape])
        for tensor in tensors
    }
    for name in sorted(theirs.keys() | ours.keys()):
        (kind, dims), (type_, shape) = theirs.get(name, (None, [])), ours.get(name, (None, []))
        same = len(dims) == len(shape) and all(size in (-1, dim) for dim, size in zip(dims, shape, strict=True))
        if kind != type_ or not same:
            raise pb.TritonModelException(f"{what}: the config has {name} {kind} {dims}, the graph {type_} {shape}")


def fits(feeds: dict[str, numpy.ndarray], profile: dict[str, list]) -> bool:
    """Whether an optimization profile takes these shapes."""
    return all(
        least <= size <= most
        for name, (low, _, high) in profile.items()
        for least, size, most in zip(low, feeds[name].shape, high, strict=True)
    )
