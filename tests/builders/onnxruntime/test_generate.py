"""Generation: the tokens of transformers and of onnxruntime-genai."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import torch
from transformers import LlamaForCausalLM

from builders.onnxruntime import OnnxRuntimeEngine, build
from builders.onnxruntime.engine import OnnxRuntimeDecoding
from builders.onnxruntime.record import ATTENTION
from exporters.export import Source, export
from smoothquant.artifacts.ports import LOGITS_TO_KEEP, PAST
from smoothquant.errors import UserError
from smoothquant.model import Model
from smoothquant.settings import SmoothingSettings
from tests.genai import genai_tokens
from tests.models import open_llama
from tests.writers import onnx_writer

PROMPT = [256, 5, 6, 7, 40, 41]
NEW = 24


@pytest.fixture(scope="module")
def engine(engines: dict[str, Path]) -> OnnxRuntimeEngine:
    return OnnxRuntimeEngine(engines["float"])


def transformers_tokens(folder: Path, count: int = NEW) -> list[int]:
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    prompt = torch.tensor([PROMPT])
    found = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count, do_sample=False, pad_token_id=0
    )
    return found[0, len(PROMPT) :].tolist()


def test_greedy_is_that_of_transformers_and_genai(
    engine: OnnxRuntimeEngine, engines: dict[str, Path], llama_folder: Path
) -> None:
    found = list(engine.generate(PROMPT, NEW))
    assert len(set(found)) > 4  # no loop of one token, which proves little
    assert [found] == [transformers_tokens(llama_folder)] == genai_tokens(engines["float"], [PROMPT], NEW)


@pytest.mark.parametrize("form", ["per-token", "per-tensor"])
def test_w8a8_greedy_is_that_of_genai(form: str, engines: dict[str, Path]) -> None:
    found = list(OnnxRuntimeEngine(engines[form]).generate(PROMPT, NEW))
    assert [found] == genai_tokens(engines[form], [PROMPT], NEW)


@pytest.mark.parametrize("form", ["float", "per-token", "per-tensor"])
def test_a_prompt_in_pieces_has_the_logits_of_all_of_it(
    form: str, engines: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, ran = OnnxRuntimeEngine(engines[form]), []
    append = OnnxRuntimeDecoding.append
    monkeypatch.setattr(OnnxRuntimeDecoding, "append", lambda self, ids: (ran.append(len(ids)), append(self, ids)))
    whole = engine.start(PROMPT).logits
    monkeypatch.setattr("builders.engine.generation.PIECE", 4)
    pieces = engine.start(PROMPT)
    assert ran == [6, 4, 2]
    for decoding in (pieces, engine.start(PROMPT[:-1])):
        if decoding is not pieces:
            decoding.step(PROMPT[-1])
        assert numpy.abs(decoding.logits - whole).max() <= 1e-5 * numpy.abs(whole).max()


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("body", ["fp32", "fp16"])
def test_genai_keeps_an_int8_cache(attention: str, body: str, llama: Model, tmp_path: Path) -> None:
    """Its cache has the graph's element type; nothing in genai_config.json says so."""
    outputs = {name: torch.full((rows,), 4.0) for name, (rows, _) in llama.linears()}
    source = Source(llama, SmoothingSettings(groups="none"), output_absmax=outputs)
    export(source, [onnx_writer(tmp_path / "onnx", "float", body=body, kv="int8")])
    build(tmp_path / "onnx", tmp_path / "engine", attention=attention)
    engine = OnnxRuntimeEngine(tmp_path / "engine")
    assert {value.type for value in engine.session.get_inputs() if value.name.startswith(PAST)} == {"tensor(int8)"}
    found = list(engine.generate(PROMPT, NEW))
    assert len(set(found)) > 4
    assert found == list(OnnxRuntimeEngine(tmp_path / "onnx").generate(PROMPT, NEW))
    assert [found] == genai_tokens(tmp_path / "engine", [PROMPT], NEW)


def test_an_engine_made_before_logits_to_keep(
    engine: OnnxRuntimeEngine, engines: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its graph has no such input, and gives the logits of all tokens."""
    older = OnnxRuntimeEngine(engines["float"])
    assert [value.name for value in older.session.get_overridable_initializers()] == [LOGITS_TO_KEEP]
    monkeypatch.setattr(older.session, "get_overridable_initializers", list)
    assert list(older.generate(PROMPT, NEW)) == list(engine.generate(PROMPT, NEW))


def test_cache_gives_the_logits_of_whole_sequences(engine: OnnxRuntimeEngine) -> None:
    tokens = torch.tensor([[*PROMPT, 90, 91, 92]])
    decoding = engine.start(PROMPT)
    for position in range(len(PROMPT), tokens.shape[1]):
        decoding.step(int(tokens[0, position]))
        expected = engine.logits(tokens[:, : position + 1])[0, -1].numpy()
        # the same float32 sums in another order
        assert abs(decoding.logits - expected).max() <= 5e-6 * abs(expected).max()


@pytest.mark.parametrize("several", [False, True])
def test_ends_at_the_end_of_sequence(
    several: bool, make_llama: Callable[..., Path], tmp_path: Path, llama_folder: Path
) -> None:
    tokens = transformers_tokens(llama_folder)
    end = next(token for token in tokens[3:] if token not in tokens[:3])
    folder = make_llama(eos_token_id=[end, 257] if several else end)  # the same weights
    export(Source(open_llama(folder), SmoothingSettings(groups="none")), [onnx_writer(tmp_path / "onnx", "float")])
    build(tmp_path / "onnx", tmp_path / "engine")
    found = list(OnnxRuntimeEngine(tmp_path / "engine").generate(PROMPT, NEW))
    assert found == tokens[: tokens.index(end)]
    assert [*found, end] == transformers_tokens(folder)


def test_counts(engine: OnnxRuntimeEngine) -> None:
    assert list(engine.generate(PROMPT, 0)) == []
    assert list(engine.generate(PROMPT, 1)) == [int(engine.logits(torch.tensor([PROMPT]))[0, -1].argmax())]
    longest = engine.manifest.facts.max_positions
    assert len(list(engine.generate([1] * (longest - 2), 2))) == 2


@pytest.mark.parametrize(
    ("prompt", "options"),
    [
        ([], {}),
        ([1] * 500, {"max_new_tokens": 13}),
        ([1] * 513, {"max_new_tokens": 0}),
        (PROMPT, {"max_new_tokens": -1}),
        ([1, 10**6], {"max_new_tokens": 1}),
        ([-1], {"max_new_tokens": 1}),
        (PROMPT, {"temperature": 1.0, "seed": 2**64}),
        (PROMPT, {"temperature": 1.0, "seed": -(2**63) - 1}),
        (PROMPT, {"temperature": -1.0}),
        (PROMPT, {"temperature": math.nan}),
        (PROMPT, {"temperature": math.inf}),
        (PROMPT, {"temperature": 1.0, "top_p": 0.0}),
        (PROMPT, {"temperature": 1.0, "top_p": 1.1}),
        (PROMPT, {"temperature": 1.0, "top_p": math.nan}),
    ],
)
def test_what_cannot_be_generated(prompt: list[int], options: dict, engine: OnnxRuntimeEngine) -> None:
    with pytest.raises(UserError, match="expected"):
        next(engine.generate(prompt, **options))


def test_sampling_is_reproducible(engine: OnnxRuntimeEngine) -> None:
    def sample(seed: int) -> list[int]:
        return list(engine.generate(PROMPT, NEW, temperature=1.0, top_p=0.95, seed=seed))

    assert sample(3) == sample(3)
    assert len(sample(2**64 - 1)) == len(sample(-(2**63))) == NEW
    assert sample(3) != sample(4)
