"""Quantizes models with llm-compressor. Runs in llm-compressor's own environment.

    python llm_compressor_worker.py < {"jobs": [{"model": FOLDER, "out": FOLDER, "form": NAME}, ...]}

Every form is smoothed with SmoothQuant first. The answer is one line of stdout for each job: {"out":
FOLDER}, or {"failed": why}.
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
    "gptq static": (GPTQModifier, (CHANNEL, TENSOR)),
    "rounded per tensor": (QuantizationModifier, ({**INT8, "strategy": "tensor"}, TENSOR)),
    "asymmetric": (QuantizationModifier, (CHANNEL, {**TENSOR, "symmetric": False})),
    "4 bits": (QuantizationModifier, ({**CHANNEL, "num_bits": 4}, {**INT8, "strategy": "token", "dynamic": True})),
}


def main() -> None:
    for job in json.load(sys.stdin)["jobs"]:
        try:
            quantize(job["model"], job["out"], job["form"])
            answer = {"out": job["out"]}
        except Exception as error:  # what it says is the answer
            answer = {"failed": " ".join(f"{type(error).__name__}: {error}".split())}
        print(json.dumps(answer), flush=True)


def quantize(folder: str, out: str, form: str) -> None:
    kind, arguments = FORMS[form]
    scheme = {"scheme": "W8A8", "targets": "Linear"}
    if arguments:
        weights, inputs = (QuantizationArgs(**each) for each in arguments)
        group = QuantizationScheme(targets=["Linear"], weights=weights, input_activations=inputs)
        scheme = {"config_groups": {"group_0": group}}
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = torch.randint(0, 256, (16, 64), generator=torch.Generator().manual_seed(1))
    text = {"input_ids": ids.tolist(), "attention_mask": torch.ones_like(ids).tolist()}
    oneshot(
        model=model,
        dataset=Dataset.from_dict(text),
        recipe=[SmoothQuantModifier(smoothing_strength=0.5), kind(ignore=["lm_head"], **scheme)],
        max_seq_length=64,
        num_calibration_samples=16,
        tokenizer=tokenizer,
    )
    model.save_pretrained(out, save_compressed=True)
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    main()
