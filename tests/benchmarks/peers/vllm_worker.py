"""A W8A8 folder in vLLM, in its own environment: python -m tests.benchmarks.peers.vllm_worker FOLDER THREADS

One engine in this process, so that a step is one call; no prefix is remembered. Speaks as `loop` says.
"""

from __future__ import annotations

import os
import sys
from itertools import count
from typing import Any

import numpy

from tests.benchmarks.peers.loop import PeerEngine, Rows, UnderWay, serve

BATCH, LONGEST = 16, 2048  # max_num_seqs, max_model_len
NUMBERS = count()


class Vllm(PeerEngine):
    """vLLM in bfloat16 with its INT8 kernels."""

    def __init__(self, folder: str) -> None:
        from vllm import LLM, SamplingParams, TokensPrompt

        self.llm = LLM(
            folder,
            dtype="bfloat16",
            enforce_eager=True,
            max_model_len=LONGEST,
            max_num_seqs=BATCH,
            enable_prefix_caching=False,
            async_scheduling=False,  # a step is a step
            skip_tokenizer_init=True,
        )
        self.vocabulary = self.llm.llm_engine.model_config.get_vocab_size()
        self._prompt, self._params = TokensPrompt, SamplingParams

    def start(self, rows: Rows) -> VllmBatch:
        wanted = self._params(max_tokens=LONGEST, ignore_eos=True, detokenize=False, temperature=0.0)
        return VllmBatch(self.llm.llm_engine, [self._prompt(prompt_token_ids=row) for row in rows], wanted)

    def logits(self, ids: numpy.ndarray) -> numpy.ndarray:
        """What the head computes of a whole prompt when it is asked for the prompt's log-probabilities."""
        wanted = self._params(max_tokens=1, prompt_logprobs=0, detokenize=False)
        found = []
        for row in ids.tolist():
            seen: list[numpy.ndarray] = []
            self.llm.apply_model(lambda model, seen=seen: _listen(model, seen))
            self.llm.generate([self._prompt(prompt_token_ids=row)], wanted, use_tqdm=False)
            self.llm.apply_model(lambda model: model.__dict__.pop("compute_logits") and None)
            logits = numpy.concatenate(seen)
            whole = numpy.full((len(row), logits.shape[1]), numpy.nan, numpy.float32)
            kept = [part for part in seen if len(part) > 1]  # the sampled token's own is one row
            whole[: len(row) - 1] = numpy.concatenate(kept)[: len(row) - 1]
            found.append(whole)
        return numpy.stack(found)


def _listen(model: Any, seen: list[numpy.ndarray]) -> None:
    """Keep what a model's head computes."""
    plain = model.compute_logits

    def listening(hidden: Any) -> Any:
        logits = plain(hidden)
        seen.append(logits.float().numpy().copy())
        return logits

    model.__dict__["compute_logits"] = listening


class VllmBatch(UnderWay):
    """Requests under way."""

    def __init__(self, engine: Any, prompts: list, wanted: Any) -> None:
        self.engine, self.names = engine, [str(next(NUMBERS)) for _ in prompts]
        self.inner = [engine.add_request(*pair, wanted) for pair in zip(self.names, prompts, strict=True)]
        waiting = set(self.names)
        while waiting:
            waiting -= {found.request_id for found in engine.step() if found.outputs and found.outputs[0].token_ids}

    def step(self) -> None:
        if not set(self.names) <= {found.request_id for found in self.engine.step()}:
            raise RuntimeError("a step gave no token to some sequences")

    def close(self) -> None:
        self.engine.abort_request(self.names)


def main() -> None:
    cores = sorted(os.sched_getaffinity(0))[: int(sys.argv[2])]
    os.environ |= {
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "HF_HUB_OFFLINE": "1",
    }
    serve(lambda: Vllm(sys.argv[1]))


if __name__ == "__main__":
    main()
