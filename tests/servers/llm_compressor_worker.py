"""Quantizes models with llm-compressor. Runs in llm-compressor's own environment.

    python llm_compressor_worker.py < {"jobs": [{"model": FOLDER, "out": FOLDER, "form": NAME}, ...]}

A job may also say "smoothing", the strength of the SmoothQuant that comes first (0.5 by default; 0 leaves it out), and
"ids", a JSON file with a list of token ids for each calibration sequence (random ones by default). Models are loaded
in float32. The answer is one line of stdout for each job: {"out": FOLDER}, or {"failed": why}.
"""

import json
import sys

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.smoothquant import SmoothQuantModifier
from transformers import AutoModelForCausalLM, AutoTokenizer

INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
CHANNEL, TENSOR = {**INT8, "strategy": "channel"}, {**INT8, "strategy": "tensor", "dynamic": False}
FORMS = {  # weights, activations; None: of the preset W8A8
    "gptq": (GPTQModifier, None),
    "rounded": (QuantizationModifier, None),
    "gptq static": (GPTQModifier, (CHANNEL, TENSOR)),
    "rounded per tensor": (QuantizationModifier, ({**INT8, "strategy": "tensor"}, TENSOR)),
    "asymmetric": (QuantizationModifier, (CHANNEL, {**TENSOR, "symmetric": False})),
    "4 bits": (QuantizationModifier, ({**CHANNEL, "num_bits": 4}, {**INT8, "strategy": "token", "dynamic": True})),
}


def main() -> None:
    for job in json.load(sys.stdin)["jobs"]:
        try:
            quantize(**job)
            answer = {"out": job["out"]}
        except Exception as error:  # what it says is the answer
            answer = {"failed": " ".join(f"{type(error).__name__}: {error}".split())}
        print(json.dumps(answer), flush=True)


def quantize(model: str, out: str, form: str, smoothing: float = 0.5, ids: str = "") -> None:
    kind, arguments = FORMS[form]
    scheme = {"scheme": "W8A8", "targets": "Linear"}
    if arguments:
        weights, inputs = (QuantizationArgs(**each) for each in arguments)
        group = QuantizationScheme(targets=["Linear"], weights=weights, input_activations=inputs)
        scheme = {"config_groups": {"group_0": group}}
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokenizer, sequences = AutoTokenizer.from_pretrained(model), token_ids(ids)
    text = {"input_ids": sequences, "attention_mask": [[1] * len(sequence) for sequence in sequences]}
    smooth = [SmoothQuantModifier(smoothing_strength=smoothing)] if smoothing else []
    oneshot(
        model=loaded,
        dataset=Dataset.from_dict(text),
        recipe=[*smooth, kind(ignore=["lm_head"], **scheme)],
        max_seq_length=max(map(len, sequences)),
        num_calibration_samples=len(sequences),
        tokenizer=tokenizer,
    )
    loaded.save_pretrained(out, save_compressed=True)
    tokenizer.save_pretrained(out)


def token_ids(path: str) -> list[list[int]]:
    """The token ids of a JSON file, or 16 x 64 random ones."""
    if path:
        with open(path, encoding="utf-8") as file:
            return json.load(file)
    return torch.randint(0, 256, (16, 64), generator=torch.Generator().manual_seed(1)).tolist()


if __name__ == "__main__":
    main()
