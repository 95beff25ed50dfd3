"""An engine folder, opened: logits of whole sequences, and generation with a KV cache."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy
import torch
from torch import Tensor

from builders.onnxruntime.session import (
    PAST,
    PRESENT,
    first_feed,
    open_session,
    subnormals_as_zero,
)
from smoothquant.errors import UserError
from smoothquant.packages import require
from smoothquant.workspace import load_manifest, read_json


class OnnxRuntimeEngine:
    """Runs an engine folder, or an ONNX export as it is.

    manifest: the folder's. providers, threads: ONNX Runtime's; the default is the CPU, one thread per physical core.
    """

    def __init__(self, folder: str | Path, providers: Sequence[str] | None = None, threads: int | None = None) -> None:
        self.folder = Path(folder)
        self.manifest = load_manifest(folder)
        self.session = open_session(self.folder, providers=providers, threads=threads)
        self.config = json.loads((self.folder / "config.json").read_text(encoding="utf-8"))

    def logits(self, ids: Tensor) -> Tensor:
        """ids: (batch, tokens) int64, whole sequences without padding; returns float32 (batch, tokens, vocab)."""
        feed = first_feed(self.session, ids.numpy())
        with subnormals_as_zero():
            return torch.from_numpy(self.session.run(["logits"], feed)[0])

    def generate(
        self,
        prompt: Sequence[int],
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> Iterator[int]:
        """Continue a prompt, token by token, until the model's end-of-sequence token or `max_new_tokens`.

        temperature 0 is greedy; otherwise tokens are sampled from the smallest set of mass `top_p`.
        Raises UserError for an empty prompt, a prompt that is too long and settings out of range.
        """
        longest = self.manifest["geometry"]["max_positions"]
        if not 0 < len(prompt) <= longest - max_new_tokens:
            raise UserError(
                f"a prompt of {len(prompt)} tokens with {max_new_tokens} new ones",
                expected=f"a prompt that is not empty, and at most {longest} tokens together",
                do="shorten the prompt, or ask for fewer tokens",
            )
        if not 0 <= temperature < math.inf or not 0 < top_p <= 1:  # NaN fails too
            raise UserError(f"temperature {temperature}, top_p {top_p}", expected="temperature >= 0 and 0 < top_p <= 1")
        generator = torch.Generator().manual_seed(seed)
        ends = self._ends()
        decoding = Decoding(self, numpy.array([prompt], dtype=numpy.int64))
        for count in range(max_new_tokens):
            token = pick(decoding.logits, temperature, top_p, generator)
            if token in ends:
                return
            yield token
            if count + 1 < max_new_tokens:
                decoding.step(token)

    def _ends(self) -> set[int]:
        found = read_json(self.folder / "generation_config.json").get("eos_token_id", self.config.get("eos_token_id"))
        return set(found if isinstance(found, list) else [found])


class Decoding:
    """One sequence under way. logits: (vocab,) float32, of the last token. The cache stays inside the runtime.

    Where every layer has a sliding window, the cache is cut back to it as soon as it holds twice as much.
    """

    def __init__(self, engine: OnnxRuntimeEngine, prompt: numpy.ndarray) -> None:
        self.session = engine.session
        self._value = require("onnxruntime").OrtValue.ortvalue_from_numpy
        self._present = [value.name for value in self.session.get_outputs() if value.name.startswith(PRESENT)]
        feed = first_feed(engine.session, prompt)
        self._cache = {name: self._value(array) for name, array in feed.items() if name.startswith(PAST)}
        self._window = engine.manifest["geometry"]["cache_window"]
        self.tokens, self.cached = prompt.shape[1], 0
        self._run(prompt, feed["position_ids"])

    def step(self, token: int) -> None:
        """Append a token."""
        self.tokens += 1
        self._run(numpy.array([[token]], dtype=numpy.int64), numpy.array([[self.tokens - 1]], dtype=numpy.int64))

    def _run(self, ids: numpy.ndarray, positions: numpy.ndarray) -> None:
        binding = self.session.io_binding()
        binding.bind_cpu_input("input_ids", ids)
        binding.bind_cpu_input("position_ids", positions)
        self.cached += ids.shape[1]
        binding.bind_cpu_input("attention_mask", numpy.ones((1, self.cached), dtype=numpy.int64))
        for name, value in self._cache.items():
            binding.bind_ortvalue_input(name, value)
        for name in ("logits", *self._present):
            binding.bind_output(name)
        with subnormals_as_zero():
            self.session.run_with_iobinding(binding)
        logits, *present = binding.get_outputs()
        names = (PAST + name.removeprefix(PRESENT) for name in self._present)
        if self._window and self.cached > 2 * self._window:  # the next token sees itself and window - 1 before it
            self.cached = self._window - 1
            present = [self._value(value.numpy()[:, :, -self.cached :]) for value in present]
        self._cache = dict(zip(names, present, strict=True))
        self.logits = torch.from_numpy(logits.numpy()[0, -1])


def pick(logits: Tensor, temperature: float, top_p: float, generator: torch.Generator) -> int:
    """A token from logits (vocab,): the likeliest at temperature 0, else one of the nucleus of mass top_p."""
    if temperature == 0:
        return int(logits.argmax())
    probabilities, order = (logits.double() / temperature).softmax(dim=-1).sort(descending=True)
    before = probabilities.cumsum(dim=-1) - probabilities  # mass of the likelier tokens; the first is always kept
    return int(order[torch.multinomial(probabilities * (before < top_p), 1, generator=generator)])
