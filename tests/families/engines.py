"""What must hold for every layout in engines: the properties that ask a runtime. See `properties`."""

from __future__ import annotations

import numpy
import pytest
import torch

from act_scales.text import Text
from builders import openvino
from builders.engine.generation import tokens_to_keep
from builders.engine.slots import Slots
from builders.onnxruntime import OnnxRuntimeEngine, build
from builders.onnxruntime.record import GROUPED
from builders.openvino.engine import OpenVinoRequest
from builders.openvino.graph import compile_graph
from builders.validate import Thresholds, validate_engines
from smoothquant.errors import UserError
from tests.families.case import Case
from tests.families.differences import GRAPH, largest_difference, products_of
from tests.genai import genai_tokens
from tests.models import sample_ids

PROMPT, NEW = [256, 5, 6, 7, 40, 41, 77, 12], 24  # more new tokens than two windows
END = 257  # of a text


def engine_generates_as_transformers(case: Case) -> None:
    """`build onnxruntime`: the float engine's greedy tokens are transformers', with the prompt in pieces, and those of
    onnxruntime-genai, in a batch, too, unless layers have windows, among whose tokens genai's padding counts.
    W8A8 engines build and run."""
    prompt = torch.tensor([PROMPT])
    expected = case.transformers.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW, do_sample=False, pad_token_id=0
    )[0, len(PROMPT) :].tolist()
    for form in ("float", "per-token", "per-tensor"):
        manifest = build(case.export(form), case.root / f"engine-{form}")
        count = products_of(case.model) if form != "float" else 0
        assert manifest.results["kernels"] == {"integer": count, "quantized": count}
    folder = case.root / "engine-float"
    ours = OnnxRuntimeEngine(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builders.engine.generation.PIECE", 3)
        alone = [list(ours.generate(prompt, NEW)) for prompt in (PROMPT, PROMPT[3:], PROMPT[:5])]
    assert alone[0] == [token for token in expected if token != END]
    windows = any(kind.window for kind in case.model.geometry.attention)
    together = alone[:1] if windows else alone
    theirs = genai_tokens(folder, (PROMPT, PROMPT[3:], PROMPT[:5])[: len(together)], NEW)
    assert [[token for token in found if token != END] for found in theirs] == together


def grouped_sequences_do_not_see_each_other(case: Case) -> None:
    """`build onnxruntime --attention grouped`: the float engine's logits are transformers', in pieces and token by
    token; W8A8 sequences of different lengths, which join and leave, get the same logits, bit by bit, as alone.
    onnxruntime-genai generates the same tokens from one buffer, in a batch, too. A dash: the operator takes heads whose
    channels are a multiple of 8; the build is refused."""
    ids = sample_ids(sequences=1, tokens=20, seed=2)
    folders = {form: case.root / f"grouped-{form}" for form in ("float", "per-token")}
    if case.model.geometry.head_dim % 8:
        with pytest.raises(UserError, match="a multiple of 8") as refused:
            build(case.export("float"), folders["float"], attention=GROUPED)
        pytest.skip(str(refused.value))
    for form, folder in folders.items():
        build(case.export(form), folder, attention=GROUPED)
    engine = OnnxRuntimeEngine(folders["float"])
    decoding = engine.slots(1, 20)
    slot, tokens = decoding.open(), ids[0].tolist()
    parts = [decoding.append(slot, tokens[:7], keep=0), decoding.append(slot, tokens[7:9], keep=0)]
    parts += [decoding.step({slot: token})[slot][None] for token in tokens[9:]]
    assert largest_difference(torch.from_numpy(numpy.concatenate(parts))[None], case.logits(ids)) <= GRAPH
    together = [list(engine.generate(prompt, NEW)) for prompt in (PROMPT, PROMPT[3:], PROMPT[:5])]
    theirs = genai_tokens(folders["float"], (PROMPT, PROMPT[3:], PROMPT[:5]), NEW)
    assert [[token for token in found if token != END] for found in theirs] == together

    engine = OnnxRuntimeEngine(folders["per-token"])
    sequences = [tokens, tokens[5:], tokens[2:14]]
    alone = [one_by_one(engine.slots(1, 20), [sequence])[0] for sequence in sequences]
    for expected, found in zip(alone, one_by_one(engine.slots(3, 20), sequences), strict=True):
        assert numpy.array_equal(expected, found)


def one_by_one(slots: Slots, sequences: list[list[int]]) -> list[numpy.ndarray]:
    """The logits of sequences from their fifth token on: each begins with a piece of four, and one after another joins
    the others' steps."""
    found: dict[int, list[numpy.ndarray]] = {}
    waiting = dict(enumerate(sequences))
    number, left = {}, {}
    while waiting or left:
        if waiting:
            index = min(waiting)
            slot = slots.open()
            number[slot], left[slot], found[index] = index, waiting[index][4:], []
            slots.append(slot, waiting.pop(index)[:4])
        for slot, logits in slots.step({slot: rest.pop(0) for slot, rest in left.items()}).items():
            found[number[slot]].append(logits)
        for slot in [slot for slot, rest in left.items() if not rest]:
            slots.close(slot)
            del left[slot]
    return [numpy.stack(found[index]) for index in range(len(sequences))]


def openvino_runs_every_layout(case: Case) -> None:
    """`build openvino`: the float graph gives the logits of transformers, token by token with a cache; every quantized
    product of the W8A8 graph is an integer kernel."""
    ids = sample_ids(sequences=1, tokens=20, seed=2)
    request = OpenVinoRequest(compile_graph(case.export("float")), batch=1)
    parts = []
    for tokens in (ids[:, :7], *ids[:, 7:].split(1, dim=1)):
        parts.append(torch.from_numpy(request.run(tokens.numpy(), keep=0)))
        request.cut(tokens_to_keep(request.cached, case.model.facts().cache_window))
    assert largest_difference(torch.cat(parts, dim=1), case.logits(ids)) <= GRAPH
    manifest, count = openvino.build(case.export("per-token"), case.root / "openvino"), products_of(case.model)
    assert manifest.results["kernels"] == {"integer": count, "quantized": count}


def engine_validates(case: Case) -> None:
    """`validate`: every quantized linear has its error, and the engine's logits are near the float model's."""
    ids = sample_ids(seed=9)
    text = Text((ids[0], ids[1], ids[2, :30]), "sample")
    limits = Thresholds(kl_mean=0.05, top1=0.7)  # random weights: many successors are almost equally likely
    [found] = validate_engines({"engine": case.export("per-token")}, case.model, text, {"engine": limits})
    assert found.passed, found.verdict
    unseen = case.model.geometry.experts - case.model.geometry.experts_per_token  # at the most, in each layer
    expected = len(case.model.quantized_roles) * case.model.geometry.layers
    assert expected - 3 * unseen * case.model.geometry.layers <= len(found.linears) <= expected
    assert min(linear.sqnr for linear in found.linears) > 20
