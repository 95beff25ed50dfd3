"""Tokens to text, in Triton's Python backend: `postprocessing/1/model.py` of the repository.

TOKENS          (batch, beams, tokens) int32, without the prompt    ->  OUTPUT  (batch, beams) string
SEQUENCE_LENGTH (batch, beams) int32
"""

import json
from typing import Any

import numpy
import triton_python_backend_utils as pb_utils
from transformers import AutoTokenizer, PreTrainedTokenizerFast


class TritonPythonModel:
    """One instance of the model; Triton calls its methods."""

    def initialize(self, args: dict[str, str]) -> None:
        parameters = json.loads(args["model_config"])["parameters"]
        folder = parameters["tokenizer_dir"]["string_value"]
        self.tokenizer = _tokenizer(folder)

    def execute(self, requests: list[Any]) -> list[Any]:
        return [self._respond(request) for request in requests]

    def _respond(self, request: Any) -> Any:
        tokens = pb_utils.get_input_tensor_by_name(request, "TOKENS").as_numpy()
        lengths = pb_utils.get_input_tensor_by_name(request, "SEQUENCE_LENGTH").as_numpy()
        texts = [
            [
                self.tokenizer.decode(beam[: int(length)], skip_special_tokens=True).encode("utf-8")
                for beam, length in zip(beams, row, strict=True)
            ]
            for beams, row in zip(tokens, lengths, strict=True)
        ]
        return pb_utils.InferenceResponse(output_tensors=[pb_utils.Tensor("OUTPUT", numpy.array(texts, dtype=object))])


def _tokenizer(folder: str, **options: Any) -> Any:
    """The tokenizer of a folder. Python code that comes with it never runs."""
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **options)
    except ValueError as error:
        if "TokenizersBackend" not in str(error):
            raise
        # transformers 4 does not know the class that transformers 5 names, and reads the same file by another name
        return PreTrainedTokenizerFast.from_pretrained(folder, trust_remote_code=False, **options)
