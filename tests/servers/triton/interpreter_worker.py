"""Continues token ids with our interpreter of TensorRT-LLM checkpoints. It runs in the tests' environment, for the
stand-in that runs in Triton's.

    python -m tests.servers.triton.interpreter_worker CHECKPOINT

A line of stdin is {"ids": [id, ...], "count": n, "words": [[id, ...], ...]}. The answer is a line of stdout,
[id, ...]: at most n new ids, up to the first that completes a word.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

import torch

from builders.tensorrt_llm.interpreter.interpreter import Interpreter


def continuation(
    interpreter: Interpreter, ids: Sequence[int], count: int, words: Sequence[Sequence[int]] = ()
) -> list[int]:
    """The likeliest new ids. words: sequences of ids that end an answer."""
    found = list(ids)
    while len(found) < len(ids) + count:
        found.append(int(interpreter.logits(torch.tensor([found]))[0, -1].argmax()))
        if any(found[-len(word) :] == list(word) for word in words):
            break
    return found[len(ids) :]


def main() -> None:
    torch.set_num_threads(1)
    interpreter = Interpreter(sys.argv[1])
    for line in sys.stdin:
        print(json.dumps(continuation(interpreter, **json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
