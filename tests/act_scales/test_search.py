"""What a search makes is what it says: the plan of every layout, measured by others; its budget; its choices."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from act_scales.search import Wanted, search
from act_scales.search.search import APART as MOST_APART
from act_scales.search.search import split
from act_scales.store import load_act_scales
from act_scales.text import Text
from builders import onnxruntime
from builders.onnxruntime import OnnxRuntimeEngine
from builders.transformers import TransformersEngine
from exporters.export import export
from exporters.huggingface import W8A8Writer
from exporters.onnx import OnnxWriter
from recipes.pipeline import source_by_plan
from smoothquant.artifacts.plan import CORRECTED, FEEDBACK, NEAREST, LinearChoice
from smoothquant.contract import TOLERANCE, Contract
from smoothquant.errors import OutputError, UserError
from smoothquant.kv_cache import cache_scales
from smoothquant.plan import read_plan
from smoothquant.scheme import PER_TOKEN, scheme_of
from smoothquant.stream import smoothed_layers
from tests.act_scales.search_cases import APART, SETTINGS, TEXT, Searched, kl_of, planned_logits, searches
from tests.families.case import Case
from tests.models import open_llama, sample_ids

LAYOUTS = ("llama", "qwen2", "opt", "opt-350m", "bloom", "falcon-7b", "falcon-40b", "phi3", "mixtral", "gemma3")
STATIC = (*[(name, "per-tensor", "int8") for name in ("llama", "bloom", "mixtral")], ("olmo2", "per-tensor", "float"))
CASES = [*[(name, "per-token", "float") for name in LAYOUTS], *STATIC]
EXPORTED = [one for one in CASES if one[0] in ("llama", "opt", "falcon-7b", "mixtral") or one in STATIC]
FLOAT32 = {"rel": 1e-3, "abs": 1e-7}  # a few tokens rounded to the other side of a step, and logarithms in float32

words = pytest.mark.parametrize("words", CASES, ids="-".join)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Searched]:
    return searches(tmp_path_factory)


@words
def test_the_plan_is_the_models_and_folds_exactly(words: tuple[str, ...], made: Callable[..., Searched]) -> None:
    found = made(*words)
    model, plan, scales = found.case.model, found.plan, load_act_scales(found.plan.act_scales)
    contract = Contract(model)
    for layer in smoothed_layers(
        model, scales.input_absmax, plan.facts.smoothing, output_absmax=scales.output_absmax, plan=plan
    ):
        contract.check(layer)
    assert contract.finish() < TOLERANCE
    assert plan.facts.scheme == replace(scheme_of(words[1], kv_cache=words[2]), float_linears=plan.float_linears)
    assert sorted(one.name for one in plan.facts.linears) == sorted(name for name, _ in model.linears())
    assert (plan.facts.tokens, plan.facts.apart, plan.facts.trial) == (9 * 32, 3 * 32, 4 * 32)
    chosen = plan.facts.chosen
    assert chosen == min(plan.facts.candidates, key=lambda one: one.kl).name
    assert {one.name for one in plan.facts.curve} == {chosen}
    shares = [one.share for one in plan.facts.curve]
    assert shares == sorted(set(shares))


@words
def test_the_curve_is_what_transformers_measures(words: tuple[str, ...], made: Callable[..., Searched]) -> None:
    """The plan's layers against the float model of transformers: everything in INT8, and with linears in float."""
    found = made(*words)
    facts, wanted = found.plan.facts, found.case.logits(APART)
    first, last = facts.curve[0], facts.curve[-1]
    whole = planned_logits(found, replace(facts.scheme, float_linears=()))
    assert kl_of(wanted, whole) == pytest.approx(first.kl, **FLOAT32)
    assert kl_of(wanted, planned_logits(found, facts.scheme)) == pytest.approx(last.kl, **FLOAT32)
    assert (wanted.argmax(-1) == whole.argmax(-1)).double().mean().item() == pytest.approx(first.top1, abs=0.011)
    losses = [
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).double(), APART[:, 1:].flatten())
        for logits in (whole, wanted)
    ]
    assert (losses[0] - losses[1]).exp().item() == pytest.approx(first.perplexity_ratio, abs=1e-4)


def test_values_of_the_cache_saturate_where_their_error_is_least(made: Callable[..., Searched]) -> None:
    """The plan's record, its files and the layers that an export stores say the same; ranges alone would say more."""
    found = made("llama", "per-tensor", "int8")
    scales, settings = load_act_scales(found.plan.act_scales), found.plan.facts.smoothing
    layers = smoothed_layers(
        found.case.model, scales.input_absmax, settings, output_absmax=scales.output_absmax, plan=found.plan
    )
    clipped = 0
    for layer, choice in zip(layers, found.plan.facts.caches, strict=True):
        assert choice.tried[f"{choice.chosen:g}"] == min(choice.tried.values())
        assert layer.cache_scales is not None
        ranges = cache_scales(found.case.model.geometry, layer.index, layer.norms, layer.output_absmax, shared=False)
        assert ranges is not None
        assert layer.cache_scales[0].equal(ranges[0])
        assert layer.cache_scales[1].item() == pytest.approx(ranges[1].item() * choice.chosen, rel=1e-6)
        clipped += choice.chosen < 1
    assert clipped
    assert not made("llama", "per-token", "float").plan.facts.caches


@pytest.mark.parametrize("words", EXPORTED, ids="-".join)
def test_exports_by_it_are_what_was_measured(
    words: tuple[str, ...], made: Callable[..., Searched], tmp_path: Path
) -> None:
    """ONNX Runtime and, where its arithmetic is ours, transformers; the bytes are the plan's."""
    found = made(*words)
    source, facts = source_by_plan(found.case.model, found.plan), found.plan.facts
    wanted = found.case.logits(APART)
    export(source, [OnnxWriter(tmp_path / "onnx", facts.scheme)])
    onnxruntime.build(tmp_path / "onnx", tmp_path / "engine")
    logits = torch.as_tensor(OnnxRuntimeEngine(tmp_path / "engine").logits(APART))
    assert kl_of(wanted, logits) == pytest.approx(facts.curve[-1].kl, rel=0.03, abs=1e-7)
    if facts.scheme.kv_cache.quantized:
        return
    export(source, [W8A8Writer(tmp_path / "w8a8", facts.scheme)])
    stored = load_file(tmp_path / "w8a8/model.safetensors")
    held = {name: tensor for name, tensor in stored.items() if name.rpartition(".")[0] not in found.plan.float_linears}
    assert_held(held, found)
    if facts.scheme.activations.static:  # per token it rounds to other steps than ours
        logits = TransformersEngine(tmp_path / "w8a8").logits(APART)
        assert kl_of(wanted, logits) == pytest.approx(facts.curve[-1].kl, **FLOAT32)


def assert_held(held: dict[str, torch.Tensor], found: Searched) -> None:
    """What a folder stores of the linears in INT8 is what the plan's files hold."""
    compared = 0
    for index in range(found.case.model.geometry.layers):
        for name, tensor in load_file(found.plan.folder / f"layers/{index:05}.safetensors").items():
            if name in held and not name.endswith(("_absmax", "smoothing_scale")):
                assert held[name].flatten().equal(tensor.flatten().to(held[name].dtype)), name
                compared += 1
    assert compared


@words
def test_linears_in_float_are_those_worth_most(words: tuple[str, ...], made: Callable[..., Searched]) -> None:
    """By loss per byte while 30 % last, by the plan's own record; those that read one input stay together."""
    found = made(*words)
    model, by_name = found.case.model, {one.name: one for one in found.plan.facts.linears}
    inputs = [
        tuple(dict.fromkeys(model.linear(layer, role) for role in roles if role != "router"))
        for layer in range(model.geometry.layers)
        for roles in model.inputs
    ]
    numbers = {names: sum(by_name[name].numbers for name in names) for names in inputs}
    losses = {names: sum(by_name[name].loss for name in names) for names in inputs}
    assert sum(numbers.values()) == sum(rows * columns for _, (rows, columns) in model.linears())
    left, kept = 0.3 * sum(numbers.values()), set()
    for names in sorted(inputs, key=lambda names: losses[names] / numbers[names], reverse=True):
        if numbers[names] <= left:
            left -= numbers[names]
            kept |= set(names)
    assert set(found.plan.float_linears) == kept
    assert found.plan.facts.curve[-1].share == pytest.approx(0.3 - left / sum(numbers.values()))


@words
def test_linears_are_rounded_as_judged(words: tuple[str, ...], made: Callable[..., Searched]) -> None:
    """Of what was tried for linears in one matrix the least error, and nobody's bias is corrected who has none."""
    found = made(*words)
    model, by_name = found.case.model, {one.name: one for one in found.plan.facts.linears}
    for layer in range(model.geometry.layers):
        for roles in model.side_by_side:
            names = [model.linear(layer, role) for role in roles]
            choices: list[LinearChoice] = [by_name[name] for name in dict.fromkeys(names)]
            weights = [names.count(one.name) for one in choices]  # roles of a fused matrix
            errors = {
                form: sum(one.errors[form] * weight for one, weight in zip(choices, weights, strict=True))
                for form in choices[0].errors
            }
            assert {one.rounding for one in choices} == {min(errors, key=lambda form: errors[form])}
            biased = any(model.family.has_bias(role, model.geometry) for role in roles)
            forms = {NEAREST, FEEDBACK} | ({NEAREST + CORRECTED, FEEDBACK + CORRECTED} if biased else set())
            assert errors.keys() == forms


@pytest.mark.parametrize("name", ["opt", "bloom"])
def test_a_corrected_bias_is_nearer(name: str, made: Callable[..., Searched]) -> None:
    """On tokens that it was not made from, for some linears at least; then it is stored."""
    found = made(name, "per-token", "float")
    corrected = [one.name for one in found.plan.facts.linears if one.rounding.endswith(CORRECTED)]
    assert corrected
    stored: dict[str, torch.Tensor] = {}
    for path in sorted(found.plan.folder.glob("layers/*")):
        stored |= load_file(path)
    assert {key.removesuffix(".bias") for key in stored if key.endswith(".bias")} == set(corrected)


def test_two_runs_give_the_same_bytes(made: Callable[..., Searched], tmp_path: Path) -> None:
    first = made("llama", "per-token", "float")
    again = search(first.case.model, TEXT, tmp_path / "plan", Wanted(PER_TOKEN, SETTINGS, 0.3))
    assert again.fingerprint == first.plan.fingerprint


def test_a_distance_instead_of_a_budget(made: Callable[..., Searched], tmp_path: Path) -> None:
    """The least share of the curve that reaches it, or one line that says what is reached."""
    first = made("llama", "per-tensor", "int8")
    curve, scheme = first.plan.facts.curve, scheme_of("per-tensor", kv_cache="int8")

    def reached(target_kl: float) -> tuple[str, ...]:
        wanted = Wanted(scheme, SETTINGS, target_kl=target_kl)
        return search(first.case.model, TEXT, tmp_path / f"{target_kl}", wanted).float_linears

    assert reached(1.0) == ()
    share = curve[-2]
    kept = reached(share.kl * 1.001)
    numbers = {one.name: one.numbers for one in first.plan.facts.linears}
    assert sum(numbers[name] for name in kept) / sum(numbers.values()) == share.share
    with pytest.raises(UserError, match=r"no share .* a KL of 1e-09; expected at least 0\.00\d+, which 2\d\.\d%") as no:
        reached(1e-9)
    assert "\n" not in str(no.value)
    assert str(tmp_path / "1e-09") in str(no.value)
    assert read_plan(tmp_path / "1e-09").float_linears  # what was measured is not lost
    with pytest.raises(UserError, match="no share"):  # nor said once alone
        reached(1e-9)
    least = float(str(no.value).partition("at least ")[2].partition(",")[0])
    assert reached(least)


@pytest.mark.parametrize("sequences", [1, 3])
def test_a_text_too_short(sequences: int, llama_folder: Path, tmp_path: Path) -> None:
    text = Text(TEXT.sequences[:sequences], "short.txt")
    with pytest.raises(UserError, match=f"short.txt: {sequences} sequences are too few .*; expected at least 4 of"):
        search(open_llama(llama_folder), text, tmp_path / "plan", Wanted())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("sequences", "apart"), [(4, 1), (7, 1), (8, 2), (31, 7), (32, 8), (100, 8)])
def test_a_quarter_judges(sequences: int, apart: int) -> None:
    text = Text(tuple(sample_ids(sequences, 2)), "sample")
    chosen, judges = split(text)
    assert len(judges) == apart <= MOST_APART
    assert torch.stack((*chosen, *judges)).equal(torch.stack(text.sequences))


def test_a_short_last_sequence_judges(llama_folder: Path, tmp_path: Path) -> None:
    """Of one token, after which nothing is foretold."""
    text = Text((*TEXT.sequences[:3], TEXT.sequences[4][:1]), "sample")
    facts = search(open_llama(llama_folder), text, tmp_path / "plan", Wanted(PER_TOKEN, SETTINGS)).facts
    assert facts.apart == 1
    assert facts.curve[0].perplexity_ratio == 1


def test_keys_of_unknown_range_are_refused(tmp_path: Path) -> None:
    case = Case("olmo2", tmp_path / "model")
    with pytest.raises(UserError, match="INT8 KV cache of keys that are normed over all heads at once"):
        search(case.model, TEXT, tmp_path / "plan", Wanted(scheme_of("per-token", kv_cache="int8"), SETTINGS))
    assert not (tmp_path / "plan").exists()


def test_progress_goes_up_and_ends(llama_folder: Path, tmp_path: Path) -> None:
    for alpha in (0.8, 0.35):  # one alpha is tried, or two
        seen: list[tuple[int, int]] = []
        wanted = Wanted(PER_TOKEN, replace(SETTINGS, alpha=alpha))
        search(
            open_llama(llama_folder), TEXT, tmp_path / f"{alpha}", wanted, progress=lambda *now, to=seen: to.append(now)
        )
        assert seen == sorted(seen)
        assert seen[-1] == (14, 14)


@pytest.mark.parametrize(("far", "tried"), [(0.0, 2), (float("inf"), 3)])
def test_a_fixed_alpha_far_behind_makes_others_needless(
    far: float, tried: int, llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("act_scales.search.trials.FAR", far)
    wanted = Wanted(PER_TOKEN, replace(SETTINGS, alpha=0.35))
    candidates = search(open_llama(llama_folder), TEXT, tmp_path / "plan", wanted).facts.candidates
    assert [one.name for one in candidates[2:]] == ["alpha 0.35"] * (tried - 2)


def test_the_record_is_plain_json(made: Callable[..., Searched]) -> None:
    """Which any reader takes: no NaN, no Infinity."""
    content = (made("mixtral", "per-tensor", "int8").plan.folder / "plan.json").read_text()
    json.loads(content, parse_constant=pytest.fail)


def test_a_disk_too_small_is_said_before_any_work(
    llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = type("Usage", (), {"free": 1 << 20})
    monkeypatch.setattr("smoothquant.workroom.shutil.disk_usage", lambda folder: free)
    seen: list[tuple[int, int]] = []
    with pytest.raises(OutputError, match="free on this disk"):
        search(open_llama(llama_folder), TEXT, tmp_path / "plan", Wanted(), progress=lambda *now: seen.append(now))
    assert not seen
