"""A search for an INT8 head: its record is what others measure, outliers cost less, and a kill loses nothing."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from act_scales.search import Wanted, search
from act_scales.store import load_act_scales
from builders import onnxruntime
from builders.onnxruntime import OnnxRuntimeEngine
from exporters.export import export
from exporters.onnx import OnnxWriter
from recipes.pipeline import source_by_plan
from smoothquant import decoder
from smoothquant.artifacts.plan import BALANCED, FEEDBACK, HEAD, NEAREST, NONE
from smoothquant.attention import patterns
from smoothquant.head import UNPLANNED, PlannedHead, head_logits, is_smoothable
from smoothquant.model import Model
from smoothquant.quantization import absmax
from smoothquant.scheme import FLOAT, scheme_of
from smoothquant.stream import runnable, smoothed_layers
from smoothquant.workroom import Workroom
from tests import zoo
from tests.act_scales.search_cases import APART, SETTINGS, TEXT, Searched, kl_of
from tests.families.case import Case
from tests.models import open_llama

LAYOUTS = ("llama", "llama-tied", "opt", "opt-350m", "gemma2", "gemma3", "granite", "bloom")
INT8_HEAD = scheme_of("per-token", head="int8")
WANTED = Wanted(INT8_HEAD, SETTINGS)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Searched]:
    """A layout with its plan, each once."""
    known: dict[str, Searched] = {}

    def searched(name: str) -> Searched:
        if name not in known:
            root = tmp_path_factory.mktemp(name)
            case = Case(name, root)
            known[name] = Searched(case, search(case.model, TEXT, root / "plan", WANTED).for_model(case.model))
        return known[name]

    return searched


@torch.no_grad()
def states(found: Searched) -> Tensor:
    """`APART` behind the plan's layers, all of them in INT8, (tokens, hidden)."""
    model, plan = found.case.model, found.plan
    scales = load_act_scales(plan.act_scales)
    hidden, positions = decoder.embed(model, APART, torch.float32), patterns(model, APART.shape[1], torch.float32)
    for layer in smoothed_layers(model, scales.input_absmax, plan.facts.smoothing, plan=plan):
        hidden = decoder.forward(model, runnable(layer, plan.facts.scheme), hidden, positions)
    return hidden.flatten(0, 1)


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_record_is_what_others_measure(name: str, made: Callable[[str], Searched]) -> None:
    """KL in float64, of all tokens that judge: to the float head behind the same layers, and to transformers."""
    found = made(name)
    model, facts = found.case.model, found.plan.facts
    assert facts.scheme == INT8_HEAD
    assert facts.head is not None
    hidden, planned = states(found), found.plan.head(model)
    after = head_logits(model, INT8_HEAD, hidden, planned)
    chosen, plain = decoder.logits(model, hidden), head_logits(model, INT8_HEAD, hidden)
    tried = facts.head.tried
    assert kl_of(chosen, after) == pytest.approx(tried[facts.head.scale][facts.head.rounding], rel=5e-3)
    assert kl_of(chosen, plain) == pytest.approx(tried[NONE][NEAREST], rel=5e-3)
    wanted = found.case.logits(APART).flatten(0, 1)
    assert kl_of(wanted, chosen) == pytest.approx(facts.head.in_float.kl, rel=1e-3, abs=1e-7)
    assert kl_of(wanted, after) == pytest.approx(facts.curve[0].kl, rel=1e-3, abs=1e-7)


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_least_of_all_candidates_is_taken(name: str, made: Callable[[str], Searched]) -> None:
    found = made(name)
    model, head = found.case.model, found.plan.facts.head
    assert head is not None
    costs = [(cost, scale, form) for scale, tried in head.tried.items() for form, cost in tried.items()]
    assert min(costs)[1:] == (head.scale, head.rounding)
    assert {form for *_, form in costs} == {NEAREST, FEEDBACK}
    assert (BALANCED in head.tried) == (len(head.tried) > 1) == is_smoothable(model)
    stored = load_file(found.plan.folder / HEAD)
    assert ("lm_head.smoothing_scale" in stored) == (head.scale != NONE)
    assert ("lm_head.weight" in stored) == (head.rounding != NEAREST)


@pytest.mark.parametrize("name", ["llama", "opt-350m", "granite"])
def test_an_engine_is_what_was_measured(name: str, made: Callable[[str], Searched], tmp_path: Path) -> None:
    found = made(name)
    export(source_by_plan(found.case.model, found.plan), [OnnxWriter(tmp_path / "onnx", INT8_HEAD)])
    onnxruntime.build(tmp_path / "onnx", tmp_path / "engine")
    logits = torch.as_tensor(OnnxRuntimeEngine(tmp_path / "engine").logits(APART))
    assert kl_of(found.case.logits(APART), logits) == pytest.approx(found.plan.facts.curve[0].kl, rel=0.05, abs=1e-7)


def test_what_the_head_reads_reaches_no_further(made: Callable[[str], Searched]) -> None:
    """So float16 holds the smoothed input wherever it holds the model's own."""
    found = made("llama")
    model, planned = found.case.model, found.plan.head(found.case.model)
    assert planned.smoothing_scale is not None
    before, after = (decoder.head_input(model, states(found), norm) for norm in (None, planned.norm(model)))
    assert absmax(after, 0).max() < 1.2 * absmax(before, 0).max()


def spiked(root: Path, factor: float, logits: float = 1.0) -> Model:
    """A model whose final norm has some far larger gains, and a head that divides by them. logits: their factor."""
    model = zoo.build("llama")
    with torch.no_grad():
        far = torch.arange(64) % 16 == 3
        model.model.norm.weight[far] *= factor
        model.lm_head.weight *= logits
        model.lm_head.weight[:, far] /= factor
    model.save_pretrained(root / "model")
    return open_llama(root / "model")


def test_channels_that_reach_far_cost_less(tmp_path: Path) -> None:
    """The function stays, and the plan saves most of what they cost."""
    model = spiked(tmp_path, 64)
    facts = search(model, TEXT, tmp_path / "plan", WANTED).for_model(model).facts
    assert facts.head is not None
    assert facts.head.scale != NONE
    assert facts.head.tried[NONE][NEAREST] > 20 * facts.head.tried[facts.head.scale][facts.head.rounding]
    assert facts.curve[0].kl < facts.head.in_float.kl + facts.head.tried[NONE][NEAREST] / 10


def test_forms_that_are_of_no_use_are_measured_too(tmp_path: Path) -> None:
    """Logits of hundreds, all of them lost in INT8 without smoothing: finite numbers that are not taken."""
    model = spiked(tmp_path, 1e5, logits=200)
    facts = search(model, TEXT, tmp_path / "plan", WANTED).for_model(model).facts
    assert facts.head is not None
    assert facts.head.scale != NONE
    assert 1 < facts.head.tried[NONE][NEAREST] < float("inf")


def test_the_head_goes_by_in_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is read some rows at a time, and what is chosen does not depend on how many these are."""
    case = Case("llama", tmp_path)
    first = search(case.model, TEXT, tmp_path / "one", WANTED)
    rows, head = case.model.rows, case.model.lm_head
    monkeypatch.setattr(case.model, "rows", lambda name: rows(name, 50) if name == head else rows(name))
    monkeypatch.setattr("smoothquant.head.ROWS", 50)
    monkeypatch.setattr(case.model, "read", refusing(case.model, head))
    second = search(case.model, TEXT, tmp_path / "other", WANTED)
    one, other = load_file(first.folder / HEAD), load_file(second.folder / HEAD)
    assert one.keys() == other.keys()
    assert (one["lm_head.weight"] != other["lm_head.weight"]).float().mean() < 1e-3
    assert first.facts.head is not None
    assert second.facts.head is not None
    for scale, tried in first.facts.head.tried.items():
        assert second.facts.head.tried[scale] == pytest.approx(tried, rel=1e-3)


def refusing(model: Model, name: str) -> Callable[..., Tensor]:
    """`Model.read`, which refuses to read one tensor as a whole."""
    read = model.read

    def found(asked: str, rows: slice | None = None) -> Tensor:
        assert asked != name or rows is not None
        return read(asked, rows)

    return found


def test_killed_while_the_head_is_searched(
    made: Callable[[str], Searched], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = made("llama")
    monkeypatch.setattr(Workroom, "due", property(lambda self: True))
    steps: list[tuple[int, int]] = []
    search(whole.case.model, TEXT, tmp_path / "steps", WANTED, progress=lambda *now: steps.append(now))
    total = steps[-1][1]
    assert [done for done, _ in steps] == sorted(done for done, _ in steps)
    assert steps[-1][0] == total
    curve = 2  # layers of it
    for at in (total - curve - 11, total - curve - 6, total - curve - 1):
        process = os.fork()
        if not process:
            try:
                search(whole.case.model, TEXT, tmp_path / "plan", WANTED, progress=dying(at))
            finally:
                os._exit(1)
        _, status = os.waitpid(process, 0)
        assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
    again = search(whole.case.model, TEXT, tmp_path / "plan", WANTED)
    assert again.fingerprint == whole.plan.fingerprint


def dying(at: int) -> Callable[[int, int], None]:
    def progress(done: int, total: int) -> None:
        if done == at:
            os.kill(os.getpid(), signal.SIGKILL)

    return progress


def test_a_silent_head(tmp_path: Path) -> None:
    """A final norm of zeros: nothing to smooth, and nothing to lose."""
    model = zoo.build("llama")
    torch.nn.init.zeros_(model.model.norm.weight)
    model.save_pretrained(tmp_path / "model")
    silent = open_llama(tmp_path / "model")
    plan = search(silent, TEXT, tmp_path / "plan", WANTED).for_model(silent)
    assert plan.facts.head is not None
    assert plan.facts.head.scale == NONE
    assert plan.head(silent).smoothing_scale is None
    assert plan.facts.curve[0].kl == 0


def test_a_float_head_has_no_file(made: Callable[[str], Searched], tmp_path: Path) -> None:
    case = made("llama").case
    plan = search(case.model, TEXT, tmp_path / "plan", Wanted(settings=SETTINGS)).for_model(case.model)
    assert plan.facts.head is None
    assert plan.facts.scheme.head == FLOAT
    assert plan.head(case.model) is UNPLANNED
    assert PlannedHead() == UNPLANNED
    assert not (plan.folder / HEAD).exists()


def test_a_head_that_costs_more_than_is_wanted(made: Callable[[str], Searched], tmp_path: Path) -> None:
    """It stays in float, and the record says what it would have cost."""
    found = made("llama")
    head = found.plan.facts.head
    assert head is not None
    cost = head.in_int8.kl - head.in_float.kl
    assert cost > 0
    for number, (limit, taken) in enumerate(((cost * 1.01, True), (cost * 0.99, False))):
        wanted = replace(WANTED, head_limit=limit)
        plan = search(found.case.model, TEXT, tmp_path / str(number), wanted).for_model(found.case.model)
        assert plan.facts.scheme.head.quantized == taken == (plan.folder / HEAD).exists()
        assert plan.facts.head == head
        assert plan.facts.curve[0] == (head.in_int8 if taken else head.in_float)
        assert plan.head(found.case.model) is not UNPLANNED if taken else plan.head(found.case.model) is UNPLANNED
