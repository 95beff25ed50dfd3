"""Engines by a plan are measured with the weights that the plan has rounded; without the plan they are refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from act_scales.text import Text
from builders import onnxruntime
from builders.validate import Validation, read_scheme, validate_engines
from builders.validate.report import read_report, write_json
from exporters.export import Source, export
from exporters.huggingface import ModelOptWriter, SmoothedWriter, W8A8Writer
from exporters.onnx import OnnxWriter
from exporters.trtllm import TrtllmWriter
from smoothquant.errors import UserError
from smoothquant.outputs import load_manifest
from smoothquant.plan import read_plan
from smoothquant.scheme import PER_TENSOR, PER_TOKEN, Scheme
from tests.families.case import Case
from tests.models import sample_ids
from tests.plans import makers, plan_of, source_with_plan, write_plan
from tests.writers import w8a8_writer

LAYOUTS = ("llama", "qwen2", "opt", "bloom", "phi3", "mixtral", "gemma3")
CLOSE = 3.0  # the distance of ONNX Runtime to the exact logits, over PyTorch's own


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Source]:
    return makers(tmp_path_factory)


@pytest.fixture(scope="module")
def text() -> Text:
    return Text((sample_ids(seed=5)[0], sample_ids(seed=5)[1, :17]), "sample")


def engine_of(source: Source, root: Path) -> Path:
    """An engine of ONNX Runtime, as the plan has it."""
    export(source, [OnnxWriter(root / "onnx", plan_of(source).facts.scheme)])
    onnxruntime.build(root / "onnx", root / "engine")
    return root / "engine"


@pytest.mark.parametrize("name", LAYOUTS)
def test_onnxruntime_runs_the_plans_integers(
    name: str, planned: Callable[[str], Source], text: Text, tmp_path: Path
) -> None:
    """As exactly as PyTorch runs what the plan says."""
    source = planned(name)
    engine = engine_of(source, tmp_path)
    assert load_manifest(engine).origin.plan == plan_of(source).fingerprint
    [found] = validate_engines({"engine": engine}, source.model, text, plans=[plan_of(source)], exact=True)
    assert found.exactness is not None
    assert found.exactness.ratio < CLOSE
    assert found.subject["inputs"]["plan"] == plan_of(source).fingerprint
    assert "alpha" not in found.subject["inputs"]["smoothing"]


def test_static_engines(text: Text, tmp_path: Path) -> None:
    source = source_with_plan(Case("llama-biased", tmp_path), PER_TENSOR)
    engine = engine_of(source, tmp_path)
    export(source, [ModelOptWriter(tmp_path / "modelopt", PER_TENSOR)])
    folders = {"engine": engine, "modelopt": tmp_path / "modelopt"}
    found = validate_engines(folders, source.model, text, plans=[plan_of(source)], exact=True)
    assert found[0].exactness is not None
    assert found[0].exactness.ratio < CLOSE
    assert abs(found[1].metrics.kl_mean / found[0].metrics.kl_mean - 1) < 0.1  # its float part is in float16


@pytest.mark.parametrize("scheme", [PER_TOKEN, PER_TENSOR], ids=lambda scheme: scheme.activations.form)
def test_linears_in_float(scheme: Scheme, text: Text, tmp_path: Path) -> None:
    """Of dynamic activations, too."""
    kept = ("model.layers.0.mlp.down_proj", "model.layers.1.mlp.gate_proj", "model.layers.1.mlp.up_proj")
    source = source_with_plan(Case("llama-biased", tmp_path), replace(scheme, float_linears=kept))
    folders = {"engine": engine_of(source, tmp_path), "w8a8": tmp_path / "w8a8"}
    export(source, [W8A8Writer(folders["w8a8"], plan_of(source).facts.scheme)])
    found = validate_engines(folders, source.model, text, plans=[plan_of(source)], exact=True)
    assert found[0].exactness is not None
    assert found[0].exactness.ratio < CLOSE
    assert found[1].metrics.kl_mean == pytest.approx(found[0].metrics.kl_mean, rel=0.2)
    assert not {linear.name for linear in found[0].linears} & set(kept)


def test_several_engines_by_one_plan(planned: Callable[[str], Source], text: Text, tmp_path: Path) -> None:
    """With one that no plan has made, too. All that is by the plan is near; what is rounded to nearest is not."""
    source, plan = planned("llama"), plan_of(planned("llama"))
    folders = {"onnx": engine_of(source, tmp_path), "w8a8": tmp_path / "w8a8", "trtllm": tmp_path / "trtllm"}
    export(source, [W8A8Writer(folders["w8a8"]), TrtllmWriter(folders["trtllm"])])
    folders |= {"hf": tmp_path / "hf", "nearest": tmp_path / "nearest"}
    export(source, [SmoothedWriter(folders["hf"])])
    export(replace(source, plan=None), [W8A8Writer(folders["nearest"])])
    found = {one.label: one for one in validate_engines(folders, source.model, text, plans=[plan])}
    kl = {label: one.metrics.kl_mean for label, one in found.items()}
    assert kl["w8a8"] == pytest.approx(kl["onnx"], rel=0.1)
    assert kl["trtllm"] == pytest.approx(kl["onnx"], rel=0.1)
    assert kl["hf"] < 1e-6
    assert kl["nearest"] < kl["onnx"] / 2
    write_json(tmp_path / "found.json", list(found.values()), inputs="key")
    assert read_report(tmp_path / "found.json", "key") is not None


def test_several_plans(planned: Callable[[str], Source], text: Text, tmp_path: Path) -> None:
    """Each engine takes its own."""
    source = planned("llama")
    scales = Case("llama", tmp_path / "again").act_scales
    plans = [read_plan(write_plan(source.model, scales, tmp_path / f"plan-{seed}", seed=seed)) for seed in (1, 2)]
    for number, plan in enumerate(plans):
        export(replace(source, plan=plan), [W8A8Writer(tmp_path / f"w8a8-{number}")])
    folders = {str(number): tmp_path / f"w8a8-{number}" for number in (0, 1)}
    assert [read_scheme(folder, plans).plan for folder in folders.values()] == plans
    found = validate_engines(folders, source.model, text, plans=plans)
    assert found[0].metrics.kl_mean != found[1].metrics.kl_mean


def test_a_plan_is_asked_for(planned: Callable[[str], Source], text: Text, tmp_path: Path) -> None:
    source, plan = planned("llama"), plan_of(planned("llama"))
    out = tmp_path / "w8a8"
    export(source, [W8A8Writer(out)])

    def said(*plans: object) -> str:
        with pytest.raises(UserError) as caught:
            validate_engines({"w8a8": out}, source.model, text, plans=plans)  # type: ignore[arg-type]
        return str(caught.value)

    assert f"{out}: made by the plan with fingerprint {plan.fingerprint}; expected that plan" in said()
    assert said().endswith("give it with --plan")
    case = Case("llama", tmp_path / "again")
    other = read_plan(write_plan(case.model, case.act_scales, tmp_path / "other", seed=1))
    assert f"{plan.fingerprint}, not by {other.folder} (fingerprint {other.fingerprint})" in said(other)
    assert f"{other.folder}: no weights of these engines are from this plan" in said(plan, other)
    export(replace(source, plan=None), [w8a8_writer(tmp_path / "plain")])
    with pytest.raises(UserError, match="no weights of these engines are from this plan"):
        validate_engines({"plain": tmp_path / "plain"}, source.model, text, plans=[plan])


def test_advice_is_more_in_float(planned: Callable[[str], Source], text: Text, tmp_path: Path) -> None:
    """The alphas are the plan's; how much stays in float is the user's to choose, without another search."""
    from builders.validate import Thresholds

    source = planned("llama")
    export(source, [W8A8Writer(tmp_path / "w8a8")])
    missed: list[Validation] = validate_engines(
        {"w8a8": tmp_path / "w8a8"}, source.model, text, {"w8a8": Thresholds(kl_mean=0.0)}, plans=[plan_of(source)]
    )
    assert missed[0].advice == "an export by the same plan with a larger --keep-float"
