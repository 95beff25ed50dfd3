"""Profiles hold every run that an engine makes, and contradictions are named."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builders.engine.generation import tokens_to_keep
from builders.nvidia.profiles import Profile
from builders.tensorrt.limits import DECODE, PREFILL, Limits, limits_for, profile_of
from smoothquant.errors import UserError
from tests.outputs import facts

GEOMETRY = facts(512, None)
windows = st.one_of(st.none(), st.integers(1, 40))


@st.composite
def limits(draw: st.DrawFn) -> Limits:
    length = draw(st.integers(2, 80))
    chunk, window = draw(st.integers(2, length)), draw(windows)
    return limits_for(facts(80, window), length=length, chunk=chunk)


def inside(held: Limits, profile: int, sequence: int, past: int) -> bool:
    """Whether a run fits, input by input, as TensorRT looks at it."""
    shapes = {
        "input_ids": (("", ""), (1, sequence)),
        "attention_mask": (("", ""), (1, past + sequence)),
        "past_key_values.0.key": (("", 2, "", 8), (1, 2, past, 8)),
    }
    for name, (dims, shape) in shapes.items():
        least, _, most = held.profiles[profile].shapes(name, dims)
        if not all(a <= b <= c for a, b, c in zip(least, shape, most, strict=True)):
            return False
    return True


@given(limits(), st.data())
def test_every_run_fits_its_profile(held: Limits, data: st.DataObject) -> None:
    prompt = data.draw(st.integers(1, held.length))
    past = 0
    for size in held.chunks(prompt):
        assert inside(held, profile_of(size), size, past)
        past = tokens_to_keep(past + size, held.window)
    for _ in range(held.length - prompt):
        assert inside(held, DECODE, 1, past)
        past = tokens_to_keep(past + 1, held.window)


def chosen_by_triton(held: Limits, sequence: int, past: int) -> int | None:
    """The profile that Triton's backend takes, by its own rule: of those that fit, the first with the least distance
    from the usual shape, whose dimensions it compares with the request's one place too early (src/instance_state.cc,
    EvaluateTensorRTContext), so that the last one counts for nothing."""
    found, shortest = None, None
    for index, profile in enumerate(held.profiles):
        if not inside(held, index, sequence, past):
            continue
        distance = 0
        for dims, shape in ((("batch", "sequence"), (1, sequence)), (("batch", "total"), (1, past + sequence))):
            _, usual, _ = profile.shapes("", dims)
            distance += abs(usual[0] - 1) + sum(abs(a - b) for a, b in zip(usual[1:], shape, strict=False))
        if shortest is None or distance < shortest:
            found, shortest = index, distance
    return found


@given(limits(), st.data())
def test_triton_takes_the_profile_that_is_meant(held: Limits, data: st.DataObject) -> None:
    """A run fits one profile only. Its cache begins with a hidden position: past is never 0."""
    size = data.draw(st.sampled_from([1, 2, held.chunk]))
    past = data.draw(st.integers(1, held.profiles[profile_of(size)].past[2]))
    assert [inside(held, profile, size, past) for profile in (PREFILL, DECODE)] == [size > 1, size == 1]
    assert chosen_by_triton(held, size, past) == profile_of(size)


def test_profiles_that_overlap_would_decode_with_the_kernels_for_prompts() -> None:
    """The control: as they were, with prefill from one token on."""
    held = limits_for(GEOMETRY, chunk=64)

    class Overlapping(Limits):
        @property
        def profiles(self) -> tuple[Profile, Profile]:
            prefill, decode = super().profiles
            return replace(prefill, sequence=(1, *prefill.sequence[1:])), decode

    overlapping = Overlapping(**asdict(held))
    assert chosen_by_triton(overlapping, 1, 100) == PREFILL
    assert chosen_by_triton(held, 1, 100) == DECODE


@given(limits())
def test_profiles_are_consistent_where_tensorrt_looks(held: Limits) -> None:
    """Least, usual and most grow, and the mask is as long as the cache and the run together at all three."""
    for profile in held.profiles:
        for least, usual, most in (profile.batch, profile.sequence, profile.past, profile.total):
            assert 0 <= least <= usual <= most
        sums = tuple(past + tokens for past, tokens in zip(profile.past, profile.sequence, strict=True))
        assert profile.total == sums


@given(limits(), st.integers(1, 80))
def test_chunks_are_the_prompt(held: Limits, prompt: int) -> None:
    chunks = list(held.chunks(prompt))
    assert sum(chunks) == prompt
    assert max(chunks) <= held.chunk
    assert all(size == held.chunk for size in chunks[1:])


def test_defaults() -> None:
    assert limits_for(facts(100_000, None)) == Limits(1, 2048, 512, 512, 1023)
    assert limits_for(GEOMETRY) == Limits(1, 512, 512, 512, 255)
    short = limits_for(facts(512, 16), batch=4)
    assert (short.batch, short.cache, short.usual_context) == (4, 32, 16)  # no layer looks further back


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"length": 513}, "--max-length 513; expected 2 to 512, the positions that the model knows"),
        ({"length": 1}, "--max-length 1; expected 2 to 512"),
        ({"chunk": 513}, "--chunk 513; expected 2 to 512"),
        ({"length": 64, "chunk": 65}, "--chunk 65; expected 2 to 64, the --max-length"),
        ({"chunk": 1}, "--chunk 1; expected 2"),
        ({"batch": 0}, "--max-batch 0; expected 1 or more"),
        ({"chunk": 16, "usual_prompt": 17}, "--usual-prompt 17; expected 2 to 16, the --chunk"),
        ({"usual_context": 512}, "--usual-context 512; expected 1 to 511"),
        ({"usual_context": 0}, "--usual-context 0; expected 1 to 511"),
    ],
)
def test_contradictions(given: dict, said: str) -> None:
    with pytest.raises(UserError) as caught:
        limits_for(GEOMETRY, **given)
    assert str(caught.value).startswith(said)
