"""The lines about the output head, the KV cache and the embedding on the page of a plan."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from smoothquant.artifacts.plan import CacheChoice, EmbeddingChoice, HeadChoice
from smoothquant.errors import UserError
from smoothquant.model import Model
from smoothquant.scheme import scheme_of
from tests.builders.validate.report.pages import EVIL, Page
from tests.builders.validate.report.test_plan_page import written
from tests.plans import HEAD_CHOICE


def text_of(model: Model, folder: Path, head: HeadChoice | None, form: str = "int8") -> str:
    scheme = scheme_of("per-token", head=form)
    return Page(written(model, folder / "plan.html", head=head, scheme=scheme)).text


def test_it_tells_what_was_chosen_and_what_it_costs(llama: Model, tmp_path: Path) -> None:
    said = text_of(llama, tmp_path, HEAD_CHOICE)
    assert "its input is smoothed (alpha 0.5), by the final norm, its weight rounded: error feedback" in said
    assert (
        "costs a KL of 0.003 to a float head that reads the same input; not smoothed and rounded to nearest, 0.02"
        in said
    )
    assert "0.009 with this head, 0.007 with a float one" in said
    assert "it stays in float" not in said
    plain = replace(HEAD_CHOICE, scale="none", rounding="nearest")
    assert "its input is not smoothed, its weight rounded: nearest. It costs a KL of 0.02" in text_of(
        llama, tmp_path, plain
    )
    assert "Output head" not in text_of(llama, tmp_path, None)
    page = text_of(llama, tmp_path, HEAD_CHOICE, "float")
    assert "with a float one. That is more than it may cost: it stays in float." in page


def test_names_are_escaped(llama: Model, tmp_path: Path) -> None:
    evil = replace(HEAD_CHOICE, tried={EVIL: {EVIL: 0.1}}, scale=EVIL, rounding=EVIL)
    Page(written(llama, tmp_path / "plan.html", head=evil))


BAD = {
    "a scale that was not tried": (replace(HEAD_CHOICE, scale="0.9"), "an output head with scale 0.9"),
    "a rounding that was not tried": (replace(HEAD_CHOICE, rounding="up"), "and rounding up; expected those"),
    "no number": (replace(HEAD_CHOICE, tried={"0.5": {"error feedback": float("nan")}}), "errors that are no numbers"),
    "no outcome": (
        replace(HEAD_CHOICE, in_float=replace(HEAD_CHOICE.in_float, kl=float("inf"))),
        "errors that are no numbers",
    ),
}


@pytest.mark.parametrize("fault", BAD)
def test_a_head_that_cannot_be_is_refused(fault: str, llama: Model, tmp_path: Path) -> None:
    head, said = BAD[fault]
    with pytest.raises(UserError, match=said):
        written(llama, tmp_path / "plan.html", head=head)


def test_it_tells_where_values_of_a_cache_saturate(llama: Model, tmp_path: Path) -> None:
    choices = (CacheChoice(0, {"1": 0.004, "0.7": 0.001}, 0.7), CacheChoice(1, {"1": 0.002, "0.7": 0.003}, 1.0))
    said = Page(written(llama, tmp_path / "plan.html", caches=choices)).text
    assert "values saturate from 70% to 100% of their maximum on" in said
    assert "leaves 62% of the squared error" in said
    for bad, words in ((0.65, "saturate from 0.65"), (float("nan"), "saturate from nan")):
        with pytest.raises(UserError, match=words):
            written(llama, tmp_path / "bad.html", caches=(replace(choices[0], chosen=bad),))


def test_it_tells_what_an_embedding_in_int8_costs(llama: Model, tmp_path: Path) -> None:
    choice = EmbeddingChoice(in_float=HEAD_CHOICE.in_float, in_int8=HEAD_CHOICE.in_int8)
    for form, more in (("int8", False), ("float", True)):
        scheme = scheme_of("per-token", embedding=form)
        said = Page(written(llama, tmp_path / f"{form}.html", embedding=choice, scheme=scheme)).text
        assert "0.0% in float, has a KL of 0.009 with it, 0.007 with a float one." in said
        assert ("with a float one. That is more than it may cost: it stays in float." in said) == more
    bad = replace(choice, in_int8=replace(choice.in_int8, kl=float("nan")))
    with pytest.raises(UserError, match="errors that are no numbers"):
        written(llama, tmp_path / "bad.html", embedding=bad)
