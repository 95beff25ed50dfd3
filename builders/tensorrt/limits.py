"""The sizes that an engine must take, and the two optimization profiles that follow from them.

           batch         sequence        past                             total
prefill    1 .. batch    2 .. chunk      0 .. length - chunk + 1          past + sequence
decode     1 .. batch    1               0 .. length - 1                  past + sequence

sequence: the tokens of a run. past: the tokens in the cache before it. total: the columns of the attention mask.

No run fits both. A run of one token is the decode profile's, a prompt's too: Triton's backend takes a profile that fits
by a distance that leaves the last dimension out (EvaluateTensorRTContext in triton-inference-server/tensorrt_backend,
src/instance_state.cc), and would decode with the kernels for prompts.

A prompt runs in chunks, so that neither its activations nor its logits (chunk x vocabulary, float32) grow with its
length. The first chunk is the short one, so the cache holds at most length - chunk tokens before a full chunk. (It
holds one more for servers whose cache begins with a hidden position: `builders.serving.triton.config`.) Where every
layer looks back a window at most, the cache holds twice the window (`builders.engine.generation.tokens_to_keep`), and
past is bounded by that.

A cache that is written in place has the capacity of the graph in every run: of its inputs, batch and sequence alone
vary.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from builders.nvidia.profiles import Profile
from smoothquant.artifacts.manifest import ModelFacts
from smoothquant.errors import UserError

PREFILL, DECODE = 0, 1  # the profiles' indices
DEFAULT_LENGTH, DEFAULT_CHUNK = 2048, 512


def profile_of(tokens: int) -> int:
    """The index of the profile for a run of so many tokens."""
    return PREFILL if tokens > 1 else DECODE


@dataclass(frozen=True)
class Limits:
    """The sizes that an engine must take.

    batch: the sequences of a run. length: the tokens of a sequence, prompt and continuation. chunk: the tokens of a
    prompt in one run. usual_prompt, usual_context: the sizes that kernels are chosen for (tokens of a prefill run;
    tokens in the cache of a decode run). window: the tokens that any layer looks back; None for all. capacity: the
    tokens of a cache that is written in place; None for a cache that grows.
    """

    batch: int
    length: int
    chunk: int
    usual_prompt: int
    usual_context: int
    window: int | None = None
    capacity: int | None = None

    @property
    def cache(self) -> int:
        """The most tokens that the cache may hold before a run."""
        return min(self.length - 1, 2 * self.window) if self.window else self.length - 1

    @property
    def profiles(self) -> tuple[Profile, Profile]:
        batch = (1, self.batch, self.batch)
        behind = min(self.length - self.chunk + 1, self.cache)
        prefill = Profile("prefill", batch, (2, self.usual_prompt, self.chunk), (0, 0, behind))
        decode = Profile("decode", batch, (1, 1, 1), (0, self.usual_context, self.cache))
        return prefill, decode

    def chunks(self, tokens: int) -> Iterator[int]:
        """Yield the sizes of the runs that a prompt is cut into, the short one first."""
        first = tokens % self.chunk
        if first:
            yield first
        for _ in range(tokens // self.chunk):
            yield self.chunk


def limits_for(
    geometry: ModelFacts,
    *,
    batch: int | None = None,
    length: int | None = None,
    chunk: int | None = None,
    usual_prompt: int | None = None,
    usual_context: int | None = None,
    capacity: int | None = None,
) -> Limits:
    """The limits of an engine, with defaults for absent ones. geometry: the model's sizes, from the export's manifest.
    capacity: of a cache that is written in place, which keeps what lies behind a window, too.

    Raises UserError if limits contradict the model's or one another.
    """
    longest, window = geometry.max_positions, geometry.cache_window
    batch, known = 1 if batch is None else batch, "the positions that the model knows"
    if capacity is not None:
        longest, window, known = capacity, None, "the capacity of the export's cache"
        length = capacity if length is None else length
        if usual_context is not None:
            raise UserError(
                f"--usual-context {usual_context}",
                expected="none for a cache that is written in place: every run reads all of it",
            )
    length = min(longest, DEFAULT_LENGTH) if length is None else length
    if not 2 <= length <= longest:
        raise UserError(f"--max-length {length}", expected=f"2 to {longest}, {known}")
    chunk = min(length, DEFAULT_CHUNK) if chunk is None else chunk
    if not 2 <= chunk <= length:
        raise UserError(f"--chunk {chunk}", expected=f"2 to {length}, the --max-length")
    if batch < 1:
        raise UserError(f"--max-batch {batch}", expected="1 or more")
    usual_prompt = chunk if usual_prompt is None else usual_prompt
    if not 2 <= usual_prompt <= chunk:
        raise UserError(f"--usual-prompt {usual_prompt}", expected=f"2 to {chunk}, the --chunk")
    cache = Limits(batch, length, chunk, usual_prompt, 1, window).cache
    usual_context = max(1, cache // 2) if usual_context is None else usual_context
    if not 1 <= usual_context <= cache:
        raise UserError(f"--usual-context {usual_context}", expected=f"1 to {cache}, the tokens of the cache")
    return Limits(batch, length, chunk, usual_prompt, usual_context, window, capacity)
