"""What a search makes is what it says: the plan of every layout, measured by others; its budget; its choices."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from act_scales.search import Wanted, search
from act_scales.search.passes import Pass, Target
from act_scales.search.scales import Policy
from act_scales.search.search import APART as MOST_APART
from act_scales.search.search import LEAST, split, width_for
from act_scales.search.statistics import Statistics
from act_scales.store import load_act_scales
from act_scales.text import Text
from builders import onnxruntime
from builders.onnxruntime import OnnxRuntimeEngine
from builders.transformers import TransformersEngine
from exporters.export import export
from exporters.huggingface import W8A8Writer
from exporters.onnx import OnnxWriter
from recipes.pipeline import source_by_plan
from smoothquant.artifacts.plan import BALANCED, CORRECTED, FEEDBACK, NEAREST, NONE, GroupChoice, LinearChoice
from smoothquant.contract import TOLERANCE, Contract
from smoothquant.errors import UserError
from smoothquant.layers import float_layer
from smoothquant.outputs import load_manifest
from smoothquant.rounding import Hessian
from smoothquant.scheme import PER_TENSOR, PER_TOKEN, scheme_of
from smoothquant.stream import smoothed_layers
from tests import zoo
from tests.act_scales.search_cases import APART, SETTINGS, TEXT, Searched, kl_of, planned_logits, searches
from tests.families.case import Case
from tests.models import open_llama, sample_ids, save_llama

LAYOUTS = (
    "llama",
    "qwen2",
    "opt",
    "opt-350m",
    "bloom",
    "falcon-7b",
    "falcon-40b",
    "phi3",
    "mixtral",
    "gemma3",
    "olmo2",
)
STATIC = [(name, "per-tensor", "int8") for name in ("llama", "qwen2", "bloom", "mixtral")] + [
    ("olmo2", "per-tensor", "float")
]
CASES = [(name, "per-token", "float") for name in LAYOUTS] + STATIC
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


@words
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


@pytest.mark.parametrize("act", ["per-token", "per-tensor"])
def test_no_smoothing_loses_where_there_are_outliers_and_is_near_where_there_are_none(act: str, tmp_path: Path) -> None:
    """The same function with and without channels that reach 64 times as far."""
    found = {}
    for outlier in (1.0, 64.0):
        folder = tmp_path / f"{outlier:g}"
        zoo.build("llama", outlier=outlier).save_pretrained(folder)
        policy = Policy("by group", (0.5, 0.8))
        found[outlier] = groups_of(folder, policy, act)
    for groups, least, most in ((found[1.0], 1.0, 2.0), (found[64.0], 5.0, float("inf"))):
        for one in groups:
            assert one.chosen == min(one.tried, key=lambda name: one.tried[name])
            assert set(one.tried) == {NONE, "0.5", "0.8", BALANCED}
            if one.through == "norm":
                assert least <= one.tried[NONE] / one.tried[one.chosen] < most


def groups_of(folder: Path, policy: Policy, act: str) -> Sequence[GroupChoice]:
    """The choices for the first layer."""
    model = open_llama(folder)
    under_way = Pass(Target(model, scheme_of(act), SETTINGS, 128), policy, TEXT.sequences[:9], TEXT.sequences[9:])
    under_way.take(float_layer(model, 0))
    return under_way.groups


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
    with pytest.raises(
        UserError, match=r"no share .* a KL of 1e-09; expected at least 0\.000\d+, which 2\d\.\d%"
    ) as no:
        reached(1e-9)
    assert "\n" not in str(no.value)
    assert not (tmp_path / "1e-09").exists()
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


@pytest.mark.parametrize("act", ["per-token", "per-tensor"])
def test_linears_of_zeros(act: str, tmp_path: Path) -> None:
    """As blocks that are added to a trained model begin: nothing comes out of o and of down, or into down."""
    folder = save_llama(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    for name in ("0.self_attn.o_proj", "0.mlp.down_proj", "1.mlp.up_proj"):
        tensors[f"model.layers.{name}.weight"].zero_()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    model = open_llama(folder)
    plan = search(model, TEXT, tmp_path / "plan", Wanted(scheme_of(act), SETTINGS, 0.3)).for_model(model)
    assert 0 < plan.facts.curve[0].kl < 0.1


def test_experts_that_no_token_reached(tmp_path: Path) -> None:
    """128 experts, 48 tokens to choose by: they are smoothed with the recipe's alpha, and lose nothing."""
    text = Text(tuple(sample_ids(4, 2)), "sample")
    case = Case("qwen3-moe-unnormed", tmp_path)
    plan = search(case.model, text, tmp_path / "plan", Wanted(PER_TENSOR, SETTINGS, 0.1)).for_model(case.model)
    silent = load_act_scales(plan.act_scales).silent
    assert silent
    inner = [one for one in plan.facts.groups if one.linears[0].rpartition(".")[0] in silent and len(one.linears) == 1]
    assert inner
    assert {one.chosen for one in inner} <= {"0.8", plan.facts.chosen.removeprefix("alpha ")}
    assert not {name for name in plan.float_linears if name.endswith("down_proj") and name.rpartition(".")[0] in silent}


def test_a_hessian_has_a_budget(llama_folder: Path, tmp_path: Path) -> None:
    model = open_llama(llama_folder)
    inputs = (64, 64, 64, 128)  # q k v, o, gate up, down

    def needed(width: int) -> int:
        return 4 * sum(channels * min(width, channels) for channels in inputs)

    assert width_for(model, needed(128)) == 128
    assert width_for(model, needed(128) - 1) == LEAST == 64
    assert width_for(model, 1) == LEAST
    plan = search(model, TEXT, tmp_path / "plan", Wanted(PER_TOKEN, SETTINGS, memory=1)).for_model(model)
    assert load_manifest(plan.folder).inputs["width"] == LEAST
    assert FEEDBACK in {one.rounding for one in plan.facts.linears}


@pytest.mark.parametrize("name", ["llama", "falcon-7b", "mixtral", "olmo2"])
def test_every_token_is_heard_once(name: str, tmp_path: Path) -> None:
    """Also where attention and MLP read one input, with another between; experts' tokens once for each expert."""
    case = Case(name, tmp_path)
    model = case.model
    heard, tokens = Statistics(model, 12 * 32, 256, sample=12 * 32), 12 * 32
    sweep = Target(model, PER_TOKEN, SETTINGS, 256).sweep(TEXT.sequences, heard)
    sweep.hear(float_layer(model, 0))
    for roles in model.inputs:
        role = next(role for role in roles if role != "router")
        found = heard.input(role)
        assert found is not None
        assert found.moments is not None
        if "." not in role:
            assert found.moments.tokens == len(found.x) == tokens
        elif len(roles) > 1:
            assert found.moments.tokens == len(found.x) == tokens * model.geometry.experts_per_token
        torch.testing.assert_close(found.moments.mean_square, found.x.square().mean(dim=0), rtol=1e-4, atol=1e-6)
        weight = found.token_weight(roles)
        assert weight.sum().item() == pytest.approx(1)
        assert len(weight.unique()) > 1
    assert all(0 < share < 1.5 for share in heard.reach.values())


def test_tokens_weigh_by_what_they_give(llama_folder: Path) -> None:
    """The inverse of their outputs' squares, over the means of each linear."""
    model = open_llama(llama_folder)
    heard = Statistics(model, 12 * 32, 0, sample=12 * 32)
    Target(model, PER_TOKEN, SETTINGS, 0).sweep(TEXT.sequences, heard).hear(float_layer(model, 0))
    found = heard.input("q")
    assert found is not None
    source = float_layer(model, 0)
    squares = [(found.x @ source.weights[role].T).square().sum(dim=1) for role in ("q", "k", "v")]
    expected = 1 / torch.stack([each / each.mean() for each in squares]).mean(dim=0)
    torch.testing.assert_close(found.token_weight(("q", "k", "v")), expected / expected.sum(), rtol=1e-4, atol=0)
    assert found.energy("q") == pytest.approx(squares[0].mean().item(), rel=1e-5)


def test_moments_are_summed_where_the_input_is() -> None:
    hessian = Hessian(6, 4, "meta")
    hessian.add(torch.empty(3, 6, device="meta"))
    assert {moment.device.type for moment in hessian.moments} == {"meta"}


def test_progress_goes_up_and_ends(llama_folder: Path, tmp_path: Path) -> None:
    for alpha in (0.8, 0.35):  # one alpha is tried, or two
        seen: list[tuple[int, int]] = []
        wanted = Wanted(PER_TOKEN, replace(SETTINGS, alpha=alpha))
        search(
            open_llama(llama_folder), TEXT, tmp_path / f"{alpha}", wanted, progress=lambda *now, to=seen: to.append(now)
        )
        assert seen == sorted(seen)
        assert seen[-1] == (12, 12)


def test_the_record_is_plain_json(made: Callable[..., Searched]) -> None:
    """Which any reader takes: no NaN, no Infinity."""
    content = (made("mixtral", "per-tensor", "int8").plan.folder / "plan.json").read_text()
    json.loads(content, parse_constant=pytest.fail)
