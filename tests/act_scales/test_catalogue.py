"""The catalogue of published act scales: what it lists, and how a name finds its file."""

from __future__ import annotations

import pytest

from act_scales.catalogue import CATALOGUE, find
from smoothquant.errors import UserError

FAMILIES = {"llama", "mistral", "mixtral", "falcon", "opt", "bloom"}


def test_every_entry_is_one_of_its_kind() -> None:
    for field in ("name", "file", "model"):
        values = [getattr(published, field) for published in CATALOGUE if getattr(published, field)]
        assert len(set(values)) == len(values)
    assert {published.family for published in CATALOGUE} == FAMILIES
    assert all(published.file.endswith(".pt") for published in CATALOGUE)
    assert [published.name for published in CATALOGUE if not published.model] == ["opt-175b"]


@pytest.mark.parametrize("name", ["mixtral-8x7b", "Mixtral-8x7B-v0.1.pt", "mistralai/Mixtral-8x7B-v0.1"])
def test_a_name_a_file_or_a_model_finds_an_entry(name: str) -> None:
    assert find(name).file == "Mixtral-8x7B-v0.1.pt"


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match="no published act scales 'llama-3-8b'") as caught:
        find("llama-3-8b")
    assert all(published.name in str(caught.value) for published in CATALOGUE)
