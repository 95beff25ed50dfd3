"""Scales from elsewhere, made a model's own: another prefix, the model's fingerprint."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from act_scales.store import ActScales
from recipes.llama import FAMILY as LLAMA
from smoothquant.checkpoint import Checkpoint
from smoothquant.errors import ActScalesError
from smoothquant.model import Model
from tests.act_scales.test_act_scales_file import Q, same, scales_of
from tests.models import open_llama


@pytest.fixture
def scales(llama: Model) -> ActScales:
    return scales_of(llama)


def bare(scales: ActScales) -> ActScales:
    """The same under the names of the base model alone: "layers..." for "model.layers..."."""
    parts = (scales.input_absmax, scales.output_absmax, {}, scales.held_absmax, scales.input_mean_square)
    return ActScales(*({name.removeprefix("model."): values for name, values in part.items()} for part in parts))


def bare_llama(folder: Path) -> Model:
    """A checkpoint of the base model alone, as old ones are."""
    tensors = load_file(folder / "model.safetensors")
    save_file({name.removeprefix("model."): values for name, values in tensors.items()}, folder / "model.safetensors")
    return Model(Checkpoint(folder), replace(LLAMA, embedding="embed_tokens", layer="layers.{}", final_norm="norm"))


def test_the_prefix_of_the_base_model_may_differ(scales: ActScales, make_llama: Callable[..., Path]) -> None:
    head = {"lm_head": torch.ones(64)}
    squares = scales.input_mean_square | head
    published = replace(scales, input_absmax=scales.input_absmax | head, input_mean_square=squares)
    assert same(published.for_model(bare_llama(make_llama())), bare(scales))
    assert same(bare(published).for_model(open_llama(make_llama())), scales)


def test_a_prefix_that_could_be_one_of_two_is_not_guessed(scales: ActScales, make_llama: Callable[..., Path]) -> None:
    both = {f"{part}.{name}": values for name, values in bare(scales).input_absmax.items() for part in ("a", "b")}
    with pytest.raises(ActScalesError, match=f"no activation scales for {Q.removeprefix('model.')}"):
        ActScales(both).for_model(bare_llama(make_llama()))


def test_stamped_scales_are_one_models(scales: ActScales, llama: Model, make_llama: Callable[..., Path]) -> None:
    published = ActScales(scales.input_absmax, metadata={"source": "somewhere"})
    stamped = published.stamped(llama)
    assert stamped.metadata == {
        "format_version": "3",
        "source": "somewhere",
        "model_fingerprint": llama.checkpoint.fingerprint,
    }
    with pytest.raises(ActScalesError, match="of another model"):
        stamped.for_model(open_llama(make_llama(seed=1)))
