"""Generate text with an engine, token by token: the loop, the choice of a token, and the end of a text.

An engine that generates says how decoding starts. The rest is the same for all engines.

On a processor, decoding reads a prompt piece by piece. A piece attends to the tokens up to its own end, while a whole
prompt multiplies all queries by all keys and masks half of the products; and its scores, (heads, piece, tokens) in
float32, take less memory. The logits stay the same. 1024 tokens of a model with 32 heads and a hidden size of 2048 took
743 ms whole and 617 ms in pieces in ONNX Runtime, 733 and 678 ms in OpenVINO (2 cores, AVX512-VNNI).

What a token gets does not depend on where pieces of two tokens or more begin, bit by bit, with grouped attention. One
token alone is another case: ONNX Runtime attends with one query in another order of summation.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy

from builders.engine.protocol import Engine
from smoothquant.errors import UserError
from smoothquant.reading import read_object
from smoothquant.values import Expectation, listed, whole

PIECE = 256  # tokens
FEW = 256  # tokens that are looked at one by one
TOKEN = whole(-1, 2**31 - 1)  # old configs say -1 for none
ENDS = Expectation("a token id, or a list of them", lambda value: TOKEN.holds(value) or listed(TOKEN).holds(value))
TOKENS: Mapping[str, Expectation] = {
    "bos_token_id": TOKEN.or_null(),
    "eos_token_id": ENDS.or_null(),
    "pad_token_id": TOKEN.or_null(),
}


class Decoding(ABC):
    """One sequence under way. logits: the logits of its last token, float32 (vocab,)."""

    logits: numpy.ndarray

    @abstractmethod
    def step(self, token: int) -> None:
        """Append a token to the sequence and compute its logits."""

    def close(self) -> None:  # noqa: B027 (most engines' caches go with the object)
        """Forget the cache."""


class GeneratingEngine(Engine):
    """An engine that keeps a KV cache and so generates text. folder: the engine's folder, which has a config.json."""

    folder: Path

    @abstractmethod
    def start(self, prompt: Sequence[int]) -> Decoding:
        """A sequence after its prompt. prompt: token ids, at least one."""

    @property
    def longest(self) -> int:
        """The largest number of tokens of a sequence."""
        return self.manifest.facts.max_positions

    def check_length(self, tokens: int) -> None:
        """Raise UserError if a sequence of so many tokens is too long for the engine."""
        if tokens > self.longest:
            raise UserError(
                f"{self.folder}: a sequence of {tokens} tokens",
                expected=f"at most {self.longest}, for which the engine was built",
                do="build it with a larger --max-length, or give a smaller --length",
            )

    def check_prompt(self, prompt: Sequence[int], max_new_tokens: int, longest: int) -> None:
        """Raise UserError for a prompt that is empty, is too long or has tokens that the model lacks.

        longest: the largest number of tokens of the prompt and its continuation.
        """
        if max_new_tokens < 0:
            raise UserError(f"{max_new_tokens} new tokens", expected="0 or more")
        if not 0 < len(prompt) <= longest - max_new_tokens:
            raise UserError(
                f"a prompt of {len(prompt)} tokens with {max_new_tokens} new ones",
                expected=f"a prompt that is not empty, and at most {longest} tokens together",
                do="shorten the prompt, or ask for fewer tokens",
            )
        vocabulary = self.manifest.facts.vocab_size
        if not all(0 <= token < vocabulary for token in prompt):
            raise UserError(
                f"{self.folder}: its tokenizer gives token id {max(prompt)}",
                expected=f"ids below {vocabulary}, this model's vocabulary",
                do="use the tokenizer that came with the model",
            )

    def generate(
        self,
        prompt: Sequence[int],
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> Iterator[int]:
        """Yield the tokens that continue a prompt, until the model's end-of-sequence token or `max_new_tokens`.

        Temperature 0 always takes the likeliest token; otherwise tokens are sampled from the smallest set of
        probability `top_p`. Raises UserError for an empty prompt, a prompt that is too long or has tokens that the
        model lacks, settings out of range, and logits that are NaN or infinite.
        """
        self.check_prompt(prompt, max_new_tokens, self.longest)
        if not 0 <= temperature < math.inf or not 0 < top_p <= 1:  # NaN fails too
            raise UserError(f"temperature {temperature}, top_p {top_p}", expected="temperature >= 0 and 0 < top_p <= 1")
        if not -(2**63) <= seed < 2**64:
            raise UserError(f"seed {seed}", expected="a number from -2^63 to 2^64 - 1")
        generator = numpy.random.default_rng(seed % 2**64)
        ends = end_tokens(self.folder)
        with closing(self.start(prompt)) as decoding:
            for count in range(max_new_tokens):
                token = pick(decoding.logits, temperature, top_p, generator)
                if token in ends:
                    return
                yield token
                if count + 1 < max_new_tokens:
                    decoding.step(token)


def pieces(prompt: Sequence[int]) -> Iterator[Sequence[int]]:
    """Yield the pieces of a prompt, in order."""
    begin = 0
    while begin < len(prompt):
        piece = piece_at(prompt, begin)
        yield piece
        begin += len(piece)


def piece_at(prompt: Sequence[int], begin: int) -> Sequence[int]:
    """The piece of a prompt that begins at a token. It does not leave a single one."""
    return prompt[begin : begin + (PIECE - 1 if len(prompt) - begin == PIECE + 1 else PIECE)]


def end_tokens(folder: Path) -> set[int]:
    """Tokens that end a sequence, by generation_config.json or else config.json."""
    found = named_tokens(folder)["eos_token_id"]
    return set(found if isinstance(found, list) else [] if found is None else [found])


def named_tokens(folder: Path) -> dict[str, Any]:
    """The tokens of `TOKENS`, by generation_config.json or else config.json; None where both say nothing or null.

    Raises UserError for values that are no tokens.
    """
    found: dict[str, Any] = dict.fromkeys(TOKENS)
    for name in ("config.json", "generation_config.json"):
        path, again = folder / name, "copy this file from where the model came from"
        content = read_object(path, do=again) if path.exists() else {}
        for key, rule in TOKENS.items():
            rule.check(content.get(key), f"{path}: {key}", again)
            found[key] = found[key] if content.get(key) is None else content[key]
    return found


def pick(logits: numpy.ndarray, temperature: float, top_p: float, generator: numpy.random.Generator) -> int:
    """A token from logits (vocab,): the likeliest at temperature 0, else one of the nucleus of mass top_p.

    Raises UserError if the largest logit is NaN or infinite.
    """
    likeliest = logits.argmax()
    if not math.isfinite(logits[likeliest]):  # where there is a NaN, argmax finds it
        raise UserError(
            "the engine's logits are NaN or infinite",
            expected="numbers",
            do="export the model again in a wider dtype",
        )
    if temperature == 0:
        return int(likeliest)
    below = logits.astype(numpy.float64) - logits[likeliest]  # <= 0: none overflows upwards, at any temperature
    with numpy.errstate(over="ignore"):
        weights = numpy.exp(below / temperature)
    if top_p == 1:
        return _drawn(weights, generator.random())
    nucleus = _nucleus(weights, top_p)
    return int(nucleus[_drawn(weights[nucleus], generator.random())])


def _nucleus(weights: numpy.ndarray, top_p: float) -> numpy.ndarray:
    """The indices of the largest weights (vocab,), largest first, until they have a share of top_p. A vocabulary is not
    sorted: of 49,152 tokens that takes 7 ms, as long as a small model's step."""
    total, count = weights.sum(), FEW
    while True:
        found = numpy.sort(numpy.argpartition(-weights, min(count, len(weights)) - 1)[:count])
        if count >= len(weights) or weights[found].sum() >= top_p * total:
            break
        count *= 8
    order = found[numpy.argsort(-weights[found], kind="stable")]
    return order[: 1 + int(numpy.searchsorted(numpy.cumsum(weights[order]) / total, top_p))]


def _drawn(weights: numpy.ndarray, random: float) -> int:
    """The index of one of the weights (n,), each with a probability that is its share. random: in [0, 1)."""
    blocks = numpy.add.reduceat(weights, numpy.arange(0, len(weights), FEW))
    block, rest = _reached(blocks, random * blocks.sum())
    begin = block * FEW
    return begin + _reached(weights[begin : begin + FEW], rest)[0]


def _reached(weights: numpy.ndarray, mass: float) -> tuple[int, float]:
    """The first index at which the weights so far exceed a mass, and what is left of it there; at most the last one
    that is not 0."""
    ends = numpy.cumsum(weights)
    index = min(int(numpy.searchsorted(ends, mass, side="right")), int(numpy.searchsorted(ends, ends[-1])))
    return index, mass - (ends[index - 1] if index else 0.0)


def tokens_to_keep(cached: int, window: int | None) -> int:
    """The number of newest tokens that stay in a cache, if no layer looks further back than `window`.

    The next token sees itself and window - 1 tokens before it. The cache is only cut when it holds twice the window,
    because cutting copies.
    """
    return window - 1 if window and cached > 2 * window else cached


def reaches(forgotten: int, tokens: int, window: int | None) -> bool:
    """Whether the token behind the first `tokens` of a sequence looks at one of its first `forgotten` tokens."""
    return forgotten > 0 and tokens - ((window or 0) - 1) < forgotten
