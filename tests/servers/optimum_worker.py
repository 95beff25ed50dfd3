"""Generates with optimum's ORTModelForCausalLM. Runs in optimum's own environment.

    python optimum_worker.py < {"jobs": [{"folder": FOLDER, "prompts": [[ID, ...], ...], "new": N}, ...]}

The answer is one line of stdout for each job: {"tokens": [[ID, ...], ...]}, the N tokens behind each prompt, the
likeliest ones; or {"failed": why}. Shorter prompts are padded on the left, as transformers does.
"""

import json
import sys

import torch
from optimum.onnxruntime import ORTModelForCausalLM


def main() -> None:
    for job in json.load(sys.stdin)["jobs"]:
        try:
            answer = {"tokens": generate(job["folder"], job["prompts"], job["new"])}
        except Exception as error:  # what it says is the answer
            answer = {"failed": " ".join(f"{type(error).__name__}: {error}".split())}
        print(json.dumps(answer), flush=True)


def generate(folder: str, prompts: list[list[int]], new: int) -> list[list[int]]:
    model = ORTModelForCausalLM.from_pretrained(folder)
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    found = model.generate(
        ids, attention_mask=mask, min_new_tokens=new, max_new_tokens=new, do_sample=False, pad_token_id=0
    )
    return found[:, longest:].tolist()


if __name__ == "__main__":
    main()
