"""Stands in for Triton's tensorrtllm backend: `BACKENDS/tensorrtllm/model.py`.

Our interpreter of TensorRT-LLM checkpoints computes, in a process of its own; the engine's folder has the checkpoint as
`checkpoint`. Every request must have the shapes and types that NVIDIA's backend wants, and becomes a line of
`requests.jsonl` in the engine's folder.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy
import triton_python_backend_utils as pb

NEEDED = ("gpt_model_type", "gpt_model_path", "guided_decoding_backend", "xgrammar_tokenizer_info_path")
NUMBERS = {  # one for each row of a request
    "input_lengths": numpy.int32,
    "request_output_len": numpy.int32,
    "end_id": numpy.int32,
    "pad_id": numpy.int32,
    "runtime_top_k": numpy.int32,
    "runtime_top_p": numpy.float32,
    "temperature": numpy.float32,
    "repetition_penalty": numpy.float32,
    "presence_penalty": numpy.float32,
    "frequency_penalty": numpy.float32,
    "min_tokens": numpy.int32,
    "seed": numpy.uint64,
}


class TritonPythonModel:
    """The one instance of a model; Triton calls its methods."""

    def initialize(self, args: dict[str, str]) -> None:
        parameters = json.loads(args["model_config"])["parameters"]
        missing = [name for name in NEEDED if name not in parameters]
        if missing:
            raise pb.TritonModelException(f"the backend needs the parameters {missing}")
        self.engine = Path(parameters["gpt_model_path"]["string_value"])
        command = [
            os.environ["TESTS_PYTHON"],
            "-m",
            "tests.servers.triton.interpreter_worker",
            self.engine / "checkpoint",
        ]
        ours = ("PATH", "HOME")
        environment = {name: os.environ[name] for name in ours} | {"PYTHONPATH": os.environ["TESTS_ROOT"]}
        self.worker = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
        )

    def execute(self, requests: list[Any]) -> list[Any]:
        return [self._respond(request) for request in requests]

    def finalize(self) -> None:
        self.worker.stdin.close()
        self.worker.wait(20)

    def _respond(self, request: Any) -> Any:
        given = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
        try:
            rows = check(given)
        except ValueError as error:
            return pb.InferenceResponse(error=pb.TritonError(str(error)))
        with (self.engine / "requests.jsonl").open("a") as log:
            log.write(json.dumps({name: array.tolist() for name, array in given.items()}) + "\n")
        found = [self._continue(given, row) for row in range(rows)]
        longest = max(map(len, found))
        ids = [[new + [int(given["end_id"][row])] * (longest - len(new))] for row, new in enumerate(found)]
        return pb.InferenceResponse(
            [
                pb.Tensor("output_ids", numpy.array(ids, dtype=numpy.int32)),
                pb.Tensor("sequence_length", numpy.array([[len(new)] for new in found], dtype=numpy.int32)),
            ]
        )

    def _continue(self, given: dict[str, numpy.ndarray], row: int) -> list[int]:
        ids = given["input_ids"][row, : given["input_lengths"][row]].tolist()
        words = [[int(given["end_id"][row])], *stop_words(given["stop_words_list"][row])]
        asked = {"ids": ids, "count": int(given["request_output_len"][row]), "words": words}
        self.worker.stdin.write(json.dumps(asked) + "\n")
        return json.loads(self.worker.stdout.readline())


def check(given: dict[str, numpy.ndarray]) -> int:
    """The number of rows of a request. Raises ValueError for a tensor of another shape or type than the backend's."""
    ids, words = given["input_ids"], given["stop_words_list"]
    if ids.dtype != numpy.int32 or ids.ndim != 2:
        raise ValueError(f"input_ids: {ids.dtype} {ids.shape}")
    rows = len(ids)
    if words.dtype != numpy.int32 or words.ndim != 3 or words.shape[:2] != (rows, 2):
        raise ValueError(f"stop_words_list: {words.dtype} {words.shape}")
    for name, array in given.items():
        if name not in ("input_ids", "stop_words_list") and (array.dtype, array.shape) != (NUMBERS[name], (rows,)):
            raise ValueError(f"{name}: {array.dtype} {array.shape}")
    return rows


def stop_words(row: numpy.ndarray) -> list[list[int]]:
    """The words in (2, n): their ids one after another; and where each ends, filled up with -1."""
    ids, ends = row.tolist()
    starts = [0, *ends]
    return [ids[start:end] for start, end in zip(starts, ends, strict=False) if end > 0]
