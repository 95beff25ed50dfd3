"""What a user asks for becomes settings in one way; what the format or the model cannot hold is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exporters.trtllm import MODES, Mode, TrtllmWriter
from recipes.families import open_model
from smoothquant.capacity import FOLDED, Capacity
from smoothquant.errors import UserError
from smoothquant.model import Model
from smoothquant.settings import CACHES, GROUPS, RUN_TIME_GROUPS, SMOOTHER_DTYPES, SmoothingSettings
from tests import zoo
from tests.exporters.trtllm.checkpoints import with_cache

ALL = GROUPS + RUN_TIME_GROUPS
CAPACITIES = st.builds(
    Capacity,
    st.just("this one"),
    st.lists(st.sampled_from(ALL), min_size=1, unique=True).map(tuple),
    st.sampled_from(SMOOTHER_DTYPES),
    st.sampled_from(CACHES),
)


@given(CAPACITIES, st.floats(0, 1), st.sampled_from(ALL))
def test_what_is_made_is_held(llama: Model, capacity: Capacity, alpha: float, groups: str) -> None:
    wanted = capacity.groups[0] if groups == "default" else groups
    if wanted not in capacity.groups:
        with pytest.raises(UserError, match=f"smoothing groups '{groups}' with this one; expected one of") as error:
            capacity.settings(llama, alpha, groups)
        assert "\n" not in str(error.value)
        return
    settings = capacity.settings(llama, alpha, groups)
    divided = {wanted, capacity.groups[0]} & set(RUN_TIME_GROUPS)
    assert (settings.alpha, settings.groups) == (alpha, wanted)
    assert settings.cache == capacity.cache
    assert settings.smoother_dtype == (capacity.smoother_dtype if divided else "float32")
    capacity.check(settings, llama)  # and each of these changes is refused
    for cache in CACHES:
        if "shared" in (cache, capacity.cache) and cache != capacity.cache:
            with pytest.raises(UserError, match=f"a KV cache '{cache}' with this one; expected one for"):
                capacity.check(replace(settings, cache=cache), llama)
        else:
            capacity.check(replace(settings, cache=cache), llama)  # keys may be smoothed for a float cache, too
    if settings.at_run_time:
        other = next(dtype for dtype in SMOOTHER_DTYPES if dtype != capacity.smoother_dtype)
        with pytest.raises(UserError, match=f"run-time scales in {other} with this one; expected the engine's"):
            capacity.check(replace(settings, smoother_dtype=other), llama)


def test_the_usual_settings(llama: Model) -> None:
    assert FOLDED.settings(llama) == SmoothingSettings() == SmoothingSettings(0.5, "default", "float32", "none")
    assert FOLDED.settings(llama, 0.0).alpha == 0  # not taken for none at all
    with pytest.raises(UserError, match=r"alpha 1\.5; expected a number in"):
        FOLDED.settings(llama, 1.5)


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.algo)
def test_tensorrt_llm(mode: Mode, llama: Model, tmp_path: Path) -> None:
    """By the form: with plugins, norms are folded into and o and down may be divided; without, every input is."""
    held = TrtllmWriter(tmp_path / "out", with_cache(mode, "int8"), dtype="bfloat16").smoothing
    assert set(held.groups) == ({"default", "paper", "none", "run-time"} if mode.plugin else {"unfolded", "none"})
    usual = SmoothingSettings(0.7, "default" if mode.plugin else "unfolded", cache="shared")
    expected = usual if mode.plugin else replace(usual, smoother_dtype="bfloat16")
    assert held.settings(llama, 0.7) == expected


def test_a_model_without_such_folds(llama: Model, tmp_path: Path) -> None:
    """OLMo 2 has no norm before its linears: the paper's groups would smooth nothing of it, and not say so."""
    model = open_model(zoo.save("olmo2", tmp_path))
    for groups in ("default", "none"):
        assert FOLDED.settings(model, groups=groups).groups == groups
    with pytest.raises(UserError, match="smoothing groups 'paper' with family olmo2, which has no such folds"):
        FOLDED.settings(model, groups="paper")
    assert FOLDED.settings(llama, groups="paper").groups == "paper"
