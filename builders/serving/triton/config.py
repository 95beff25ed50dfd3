"""config.pbtxt of a decoder: what Triton has to know, and who keeps the KV cache.

The server keeps it, as implicit state of a sequence (`sequence_batching { state }`): what a request writes to present
is the past of the next request with the same sequence id, and grows from one to the next. The client sends tokens and
gets logits; the cache never leaves the server.

Triton cannot begin a state with an empty tensor: a dimension that varies begins at 1. So a cache begins with one
position of zeros, and the mask hides it: every attention_mask has a 0 before its ones. A hidden position has weight 0
in the softmax, exactly. position_ids count the real tokens, from 0.

max_batch_size is 0, the batch dimension is explicit and 1: sequences differ in length, so no two of them fit into one
run. `oldest` lets several take turns on one instance. States grow, which rules out use_same_buffer_for_input_output.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from smoothquant.artifacts.ports import PAST, PRESENT

IDLE_MICROSECONDS = 600_000_000  # a sequence that sends nothing for so long is forgotten
DTYPES = {"float32": "FP32", "float16": "FP16", "bfloat16": "BF16", "int8": "INT8", "int64": "INT64"}


class Tensor(NamedTuple):
    """An input or output. dtype: PyTorch's name; shape: -1 where it varies, the batch first."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Serving:
    """How a model is served.

    backend: Triton's. inputs, outputs: of the graph, the cache among them. gpu: whether it runs on one. profiles:
    optimization profiles of a TensorRT engine. accelerator: of ONNX Runtime on a GPU, name and parameters.
    parameters: of the backend. sequences: how many may take turns on an instance. notes: for the head of the file.
    """

    backend: str
    inputs: Sequence[Tensor]
    outputs: Sequence[Tensor]
    gpu: bool
    profiles: int = 0
    accelerator: tuple[str, Mapping[str, str]] | None = None
    parameters: Mapping[str, str] = field(default_factory=dict)
    sequences: int = 16
    notes: Sequence[str] = ()


def config(serving: Serving) -> str:
    """The text of config.pbtxt. The folder's name is the model's."""
    inputs = [tensor for tensor in serving.inputs if not tensor.name.startswith(PAST)]
    outputs = [tensor for tensor in serving.outputs if not tensor.name.startswith(PRESENT)]
    past = [tensor for tensor in serving.inputs if tensor.name.startswith(PAST)]
    kind = "KIND_GPU" if serving.gpu else "KIND_CPU"
    profiles = ", ".join(f'"{index}"' for index in range(serving.profiles))
    lines = [
        *(f"# {note}" for note in serving.notes),
        f'backend: "{serving.backend}"',
        "max_batch_size: 0",
        *_list("input", map(_tensor, inputs)),
        *_list("output", map(_tensor, outputs)),
        "sequence_batching {",
        f"  max_sequence_idle_microseconds: {IDLE_MICROSECONDS}",
        f"  oldest {{ max_candidate_sequences: {serving.sequences} }}",
        *(f"  {line}" for line in _list("state", map(_state, past))),
        "}",
        f"instance_group [ {{ count: 1 kind: {kind}{f' profile: [ {profiles} ]' if profiles else ''} }} ]",
    ]
    if serving.accelerator:
        name, values = serving.accelerator
        parameters = " ".join(f'parameters {{ key: "{key}" value: "{value}" }}' for key, value in values.items())
        lines.append(
            f'optimization {{ execution_accelerators {{ gpu_execution_accelerator: [ {{ name: "{name}" {parameters} }} '
            "] } }"
        )
    lines += [
        f'parameters {{ key: "{key}" value: {{ string_value: "{value}" }} }}'
        for key, value in serving.parameters.items()
    ]
    return "\n".join(lines) + "\n"


def _list(name: str, items: Iterable[str]) -> list[str]:
    return [f"{name} [", ",\n".join(f"  {item}" for item in items), "]"]


def _dims(shape: Sequence[int]) -> str:
    return f"[ {', '.join(map(str, shape))} ]"


def _tensor(tensor: Tensor) -> str:
    return f'{{ name: "{tensor.name}" data_type: TYPE_{DTYPES[tensor.dtype]} dims: {_dims((1, *tensor.shape[1:]))} }}'


def _state(past: Tensor) -> str:
    name, dtype = past.name.removeprefix(PAST), f"TYPE_{DTYPES[past.dtype]}"
    first = _dims([1 if dim < 0 else dim for dim in past.shape])
    return (
        f'{{ input_name: "{past.name}" output_name: "{PRESENT}{name}" data_type: {dtype} '
        f"dims: {_dims((1, *past.shape[1:]))} "
        f'initial_state {{ name: "empty" data_type: {dtype} dims: {first} zero_data: true }} }}'
    )
