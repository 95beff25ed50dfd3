"""Text to tokens, in Triton's Python backend: `preprocessing/1/model.py` of the repository.

QUERY          (batch, 1) string        ->  INPUT_IDS      (batch, tokens) int32, padded on the right
                                            INPUT_LENGTHS  (batch, 1) int32
                                            END_ID, PAD_ID (batch, 1) int32
                                            STOP_WORDS     (batch, 2, n) int32: further end tokens, and their ends
"""

import json
from pathlib import Path
from typing import Any

import numpy
import triton_python_backend_utils as pb_utils
from transformers import AutoTokenizer, PreTrainedTokenizerFast


class TritonPythonModel:
    """One instance of the model; Triton calls its methods."""

    def initialize(self, args: dict[str, str]) -> None:
        parameters = json.loads(args["model_config"])["parameters"]
        folder = parameters["tokenizer_dir"]["string_value"]
        self.tokenizer = _tokenizer(folder, padding_side="right")
        self.ends = _end_tokens(Path(folder), self.tokenizer.eos_token_id)
        pad = self.tokenizer.pad_token_id
        self.pad = self.ends[0] if pad is None else pad

    def execute(self, requests: list[Any]) -> list[Any]:
        return [self._respond(request) for request in requests]

    def _respond(self, request: Any) -> Any:
        try:
            texts = pb_utils.get_input_tensor_by_name(request, "QUERY").as_numpy().reshape(-1)
            rows = [self._ids(text.decode("utf-8")) for text in texts]
            if not all(rows):
                raise ValueError("the prompt has no tokens")
        except Exception as error:  # a fault of one request is the answer to that request
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(f"preprocessing: {error}"))
        batch, longest = len(rows), max(map(len, rows))
        ids = [row + [self.pad] * (longest - len(row)) for row in rows]
        others = self.ends[1:]
        stops = [others, list(range(1, len(others) + 1))] if others else [[0], [-1]]
        outputs = {
            "INPUT_IDS": ids,
            "INPUT_LENGTHS": [[len(row)] for row in rows],
            "END_ID": [[self.ends[0]]] * batch,
            "PAD_ID": [[self.pad]] * batch,
            "STOP_WORDS": [stops] * batch,
        }
        tensors = [pb_utils.Tensor(name, numpy.array(value, dtype=numpy.int32)) for name, value in outputs.items()]
        return pb_utils.InferenceResponse(output_tensors=tensors)

    def _ids(self, text: str) -> list[int]:
        """Token ids of a prompt. One that begins with the token of beginnings does not get it twice."""
        ids, begin = self.tokenizer(text)["input_ids"], self.tokenizer.bos_token_id
        return ids[1:] if begin is not None and ids[:2] == [begin, begin] else ids


def _end_tokens(folder: Path, eos_token_id: int | None) -> list[int]:
    """All tokens that end an answer; the tokenizer's end token is the first."""
    found = [eos_token_id]
    for path in (folder / "generation_config.json", folder / "config.json"):
        listed = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id") if path.is_file() else None
        if listed is not None:  # else the next file says it
            found += listed if isinstance(listed, list) else [listed]
            break
    ends = list(dict.fromkeys(token for token in found if token is not None))
    return ends or [-1]  # none: only the length ends an answer


def _tokenizer(folder: str, **options: Any) -> Any:
    """The tokenizer of a folder. Python code that comes with it never runs."""
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, **options)
    except ValueError as error:
        if "TokenizersBackend" not in str(error):
            raise
        # transformers 4 does not know the class that transformers 5 names, and reads the same file by another name
        return PreTrainedTokenizerFast.from_pretrained(folder, trust_remote_code=False, **options)
