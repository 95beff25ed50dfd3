"""Write config.pbtxt of a decoder, whose KV cache Triton keeps.

Triton keeps the cache as the implicit state of a sequence (`sequence_batching { state }`). The present that a request
writes is the past of the next request with the same sequence id, and grows from one request to the next. The client
sends tokens and gets logits; the cache never leaves the server.

Triton cannot begin a state with an empty tensor: a dimension that varies begins at 1. So a cache begins with one
position of zeros, which the mask hides: every attention_mask has a 0 before its ones. The weight of a hidden position
in the softmax is exactly 0. position_ids count the real tokens, from 0.

max_batch_size is 0, and the explicit batch dimension is 1: sequences differ in length, so no two of them fit into one
run. `oldest` lets several sequences take turns on one instance. States grow, which rules out
use_same_buffer_for_input_output.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from builders.serving.pbtxt import Line, Message, Name, dumps, entries, parameters
from smoothquant.artifacts.ports import PAST, PRESENT

IDLE_MICROSECONDS = 600_000_000  # the server forgets a sequence after so long without a request
SEQUENCES = 16  # that take turns on an instance
DTYPES = {"float32": "FP32", "float16": "FP16", "bfloat16": "BF16", "int8": "INT8", "int64": "INT64"}


class ModelTensor(NamedTuple):
    """An input or output. dtype: PyTorch's name. shape: its dimensions, the batch first; -1 stands for any size."""

    name: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class DecoderModel:
    """A decoder for Triton.

    backend: the name of Triton's backend. inputs, outputs: those of the graph, the cache included. gpu: whether it runs
    on a GPU. profiles: the number of optimization profiles of a TensorRT engine. accelerator: the name and parameters
    of ONNX Runtime's accelerator on a GPU. parameters: the backend's parameters. sequences: the number of sequences
    that may take turns on an instance. notes: comments for the head of the file.
    """

    backend: str
    inputs: Sequence[ModelTensor]
    outputs: Sequence[ModelTensor]
    gpu: bool
    profiles: int = 0
    accelerator: tuple[str, Mapping[str, str]] | None = None
    parameters: Mapping[str, str] = field(default_factory=dict)
    sequences: int = SEQUENCES
    notes: Sequence[str] = ()


def config(serving: DecoderModel) -> str:
    """The text of config.pbtxt. It holds no name, since Triton takes the folder's name for the model's."""
    group: Message = {"count": 1, "kind": Name("KIND_GPU" if serving.gpu else "KIND_CPU")}
    if serving.profiles:
        group["profile"] = [str(index) for index in range(serving.profiles)]
    message: Message = {
        "backend": serving.backend,
        "max_batch_size": 0,
        "input": [_tensor(tensor) for tensor in serving.inputs if not tensor.name.startswith(PAST)],
        "output": [_tensor(tensor) for tensor in serving.outputs if not tensor.name.startswith(PRESENT)],
        "sequence_batching": {
            "max_sequence_idle_microseconds": IDLE_MICROSECONDS,
            "oldest": {"max_candidate_sequences": serving.sequences},
            "state": [_state(tensor) for tensor in serving.inputs if tensor.name.startswith(PAST)],
        },
        "instance_group": Line(group),
    }
    if serving.accelerator:
        name, values = serving.accelerator
        used = {"name": name, "parameters": entries(values)}
        message["optimization"] = {"execution_accelerators": {"gpu_execution_accelerator": used}}
    return dumps(message | {"parameters": parameters(serving.parameters)}, serving.notes)


def _tensor(tensor: ModelTensor) -> Message:
    return Line(name=tensor.name, data_type=_type(tensor), dims=[1, *tensor.shape[1:]])


def _state(past: ModelTensor) -> Message:
    first = [1 if dim < 0 else dim for dim in past.shape]
    return Line(
        input_name=past.name,
        output_name=PRESENT + past.name.removeprefix(PAST),
        data_type=_type(past),
        dims=[1, *past.shape[1:]],
        initial_state=Line(name="empty", data_type=_type(past), dims=first, zero_data=True),
    )


def _type(tensor: ModelTensor) -> Name:
    return Name(f"TYPE_{DTYPES[tensor.dtype]}")
