"""The float graph is transformers' Llama: whole, with a cache, and with padding."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.exporters.onnx.graphs import FLOAT, Runner, export_onnx, source_of
from tests.models import sample_ids
from tests.smoothquant.test_decoder import VARIANTS

# float32 rounding in another order of operations, smoothing folded in (itself within 1e-5): relative to the largest
TOLERANCE = 2e-5


def transformers_logits(folder: Path, ids: torch.Tensor, dtype: torch.dtype = torch.float32, **inputs) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)(ids, **inputs).logits.float()


def assert_equal(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()


@pytest.mark.parametrize("variant", VARIANTS)
def test_float_graph_is_transformers(variant: str, make_llama: Callable[..., Path], tmp_path: Path) -> None:
    folder, ids = make_llama(**VARIANTS[variant]), sample_ids(sequences=3, tokens=20, seed=2)
    out = export_onnx(source_of(folder), tmp_path / "out", **FLOAT)
    expected = transformers_logits(folder, ids)
    assert_equal(Runner(out / "model.onnx").run(ids)[0], expected)

    chunked = Runner(out / "model.onnx")
    parts = [chunked.run(ids[:, :7])[0], *(chunked.run(ids[:, i : i + 1])[0] for i in range(7, ids.shape[1]))]
    assert_equal(torch.cat(parts, dim=1), expected)

    padding = [0, 3, 11]
    mask = torch.stack([(torch.arange(ids.shape[1]) >= count).long() for count in padding])
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    padded = transformers_logits(folder, ids, attention_mask=mask, position_ids=positions)
    assert not torch.allclose(padded[2, 11:], expected[2, 11:], rtol=1e-2)  # the mask matters
    assert_equal(Runner(out / "model.onnx").run(ids, mask, positions)[0][mask.bool()], padded[mask.bool()])

    chunked = Runner(out / "model.onnx")  # padding and cache at once: one prompt, then one token at a time
    parts = [chunked.run(ids[:, :12], mask[:, :12], positions[:, :12])[0]]
    parts += [chunked.run(ids[:, i : i + 1], mask[:, : i + 1], positions[:, i : i + 1])[0] for i in range(12, 20)]
    assert_equal(torch.cat(parts, dim=1)[mask.bool()], padded[mask.bool()])


@pytest.mark.parametrize("variant", ["grouped heads", "biases", "tied embeddings"])
def test_half_precision_graph(variant: str, make_llama: Callable[..., Path], tmp_path: Path) -> None:
    """Float16 rounds at every operation: how far that leads from float32 is what transformers' own float16 shows."""
    folder, ids = make_llama(**VARIANTS[variant]), sample_ids(seed=2)
    out = export_onnx(source_of(folder), tmp_path / "out", **FLOAT, body="fp16")
    expected = transformers_logits(folder, ids)
    [found] = Runner(out / "model.onnx").run(ids)
    theirs = transformers_logits(folder, ids, torch.float16)
    assert found.dtype == torch.float32
    assert (found - expected).norm() <= 1.5 * (theirs - expected).norm()


def test_padding_tokens_do_not_matter(make_llama: Callable[..., Path], tmp_path: Path) -> None:
    """What stands where the mask is 0 changes nothing, not even a bit; a row of padding alone stays finite."""
    folder, ids = make_llama(), sample_ids(sequences=2, tokens=16)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    mask[1] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    other = ids.clone()
    other[0, :5] = 7
    for body in ("fp32", "fp16"):
        runner = Runner(export_onnx(source_of(folder), tmp_path / body, **FLOAT, body=body) / "model.onnx")
        found = []
        for prompt in (ids, other):
            runner.past = {}
            found.append(runner.run(prompt, mask, positions)[0])
        assert torch.equal(found[0][0, 5:], found[1][0, 5:])
        assert found[0].isfinite().all()
