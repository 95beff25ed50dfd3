"""Prints the log-probabilities that vLLM gives the tokens of prompts. Runs in vLLM's own environment.

    python vllm_worker.py < {"folder": ..., "sequences": [[id, ...], ...]}

The answer is the last line of stdout: {"linears": {name: class of its kernel}, "log_probabilities": [[number of every
token but the first], ...]}, or {"refused": the last line of what vLLM says}.
"""

import json
import os
import sys

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


def main() -> None:
    asked = json.load(sys.stdin)
    from vllm import LLM, SamplingParams, TokensPrompt

    longest = max(map(len, asked["sequences"]))
    try:
        llm = LLM(
            asked["folder"],
            enforce_eager=True,
            dtype="bfloat16",
            max_model_len=longest + 8,
            max_num_seqs=2,
            skip_tokenizer_init=True,
            disable_log_stats=True,
        )
    except Exception as error:
        print(json.dumps({"refused": str(error).strip().splitlines()[-1]}))
        return
    wanted = SamplingParams(prompt_logprobs=0, max_tokens=1, detokenize=False)
    prompts = [TokensPrompt(prompt_token_ids=sequence) for sequence in asked["sequences"]]
    found = []
    for answer, sequence in zip(llm.generate(prompts, wanted, use_tqdm=False), asked["sequences"], strict=True):
        pairs = zip(answer.prompt_logprobs[1:], sequence[1:], strict=True)
        found.append([given[token].logprob for given, token in pairs])
    print(json.dumps({"log_probabilities": found}))


if __name__ == "__main__":
    main()
