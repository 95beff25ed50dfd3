"""The reference is transformers' float32 model, whatever the lengths of the sequences."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from act_scales.text import Text
from builders.validate import Reference, read_scheme
from smoothquant import batches
from smoothquant.errors import UserError
from smoothquant.memory import Budget
from smoothquant.model import Model
from tests.models import hooked_absmax, open_llama, sample_ids


@torch.no_grad()
@pytest.mark.parametrize(("batch", "numbers"), [(1, None), (60, 500), (10_000, None)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_those_of_transformers(
    dtype: torch.dtype,
    batch: int,
    numbers: int | None,
    make_llama: Callable[..., Path],
    text: Text,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(batches, "BATCH_TOKENS", batch)
    folder = make_llama(dtype=dtype)
    found = Reference(open_llama(folder), text, budget=Budget(numbers))
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for index, ids in enumerate(text.sequences):
        expected = model(ids[None]).logits[0]
        # float32 rounding, summed over two layers in another order: a few units of 1.2e-7
        assert (found.logits(index) - expected).abs().max() <= 5e-6 * expected.abs().max()
    assert found.name == ("FP32" if dtype == torch.float32 else "BF16")


def test_activation_maxima_are_those_of_hooks(llama: Model) -> None:
    ids = sample_ids(seed=9)
    found = Reference(llama, Text(tuple(ids), "sample")).act_absmax
    expected = hooked_absmax(llama.checkpoint.folder, ids)
    firsts = {name for name in expected if name.endswith(("q_proj", "o_proj", "gate_proj", "down_proj"))}
    assert found.keys() == firsts
    for name, absmax in found.items():
        torch.testing.assert_close(absmax, expected[name], rtol=1e-4, atol=1e-5)  # float32 over two layers


def test_progress_counts_layers(llama: Model, text: Text) -> None:
    seen: list[tuple[int, int]] = []
    Reference(llama, text, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(0, 2), (1, 2), (2, 2)]


def test_float_engines_have_no_stream(llama: Model, text: Text, folders: Path) -> None:
    schemes = [read_scheme(folders / name) for name in ("hf", "w8a8", "w8a8")]
    assert list(Reference(llama, text, schemes).streams) == [schemes[1].key]


@pytest.mark.parametrize(
    ("ids", "fault"),
    [
        ([7], "no sequence of two tokens"),
        ([1] * 513, "a sequence of 513 tokens; expected at most 512"),
        ([1, 288], "token 288; expected tokens of this model, 0 to 287"),
        ([1, -1], "token -1; expected"),
    ],
)
def test_text_that_does_not_suit_the_model(ids: list[int], fault: str, llama: Model) -> None:
    with pytest.raises(UserError, match=fault):
        Reference(llama, Text((torch.tensor(ids),), "sample"))
