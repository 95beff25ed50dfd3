"""Prints the log-probabilities that vLLM gives the tokens of prompts. Runs in vLLM's own environment.

    python vllm_worker.py < {"folders": [...], "sequences": [[id, ...], ...]}

The answer is one line of stdout for each folder: {"log_probabilities": [[number of every token but the first], ...],
"kernels": [names of the classes that multiply int8]}, or {"refused": why}.
"""

import gc
import json
import os
import sys

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "HF_HUB_OFFLINE": "1",
}


def main() -> None:
    asked = json.load(sys.stdin)
    for folder in asked["folders"]:
        try:
            answer = run(folder, asked["sequences"])
        except Exception as error:  # what vLLM says is the answer
            answer = {"refused": " ".join(f"{type(error).__name__}: {error}".split())}
        print(json.dumps(answer), flush=True)
        gc.collect()


def run(folder: str, sequences: list) -> dict:
    from vllm import LLM, SamplingParams, TokensPrompt

    llm = LLM(
        folder,
        enforce_eager=True,
        dtype="bfloat16",
        max_model_len=max(map(len, sequences)) + 8,
        max_num_seqs=2,
        skip_tokenizer_init=True,
    )
    wanted = SamplingParams(prompt_logprobs=0, max_tokens=1, detokenize=False)
    prompts = [TokensPrompt(prompt_token_ids=sequence) for sequence in sequences]
    found = []
    for answer, sequence in zip(llm.generate(prompts, wanted, use_tqdm=False), sequences, strict=True):
        pairs = zip(answer.prompt_logprobs[1:], sequence[1:], strict=True)
        found.append([given[token].logprob for given, token in pairs])
    return {"log_probabilities": found, "kernels": llm.apply_model(kernels)[0]}


def kernels(model: object) -> list[str]:
    names = set()
    for module in model.modules():
        scheme = getattr(module, "scheme", None)
        if scheme is not None:
            names.add(type(getattr(scheme, "kernel", scheme)).__name__)
    return sorted(names)


if __name__ == "__main__":
    main()
