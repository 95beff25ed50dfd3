"""A search for an embedding in INT8: its record is what engines give, and a limit keeps it in float."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from act_scales.search import Wanted, search
from builders import onnxruntime
from builders.onnxruntime import OnnxRuntimeEngine
from exporters.export import export
from exporters.onnx import OnnxWriter
from recipes.pipeline import source_by_plan
from smoothquant.plan import Plan
from smoothquant.scheme import FLOAT, Scheme, scheme_of
from tests.act_scales.search_cases import APART, SETTINGS, TEXT, kl_of
from tests.families.case import Case

SCHEME = scheme_of("per-token", head="int8", embedding="int8")
WANTED = Wanted(SCHEME, SETTINGS, budget=0.3)


def planned(case: Case, name: str, wanted: Wanted) -> Plan:
    return search(case.model, TEXT, case.root / name, wanted).for_model(case.model)


def logits(case: Case, plan: Plan, scheme: Scheme, out: Path) -> Tensor:
    """Of `APART`, by an engine of the plan."""
    export(source_by_plan(case.model, plan), [OnnxWriter(out / "onnx", scheme)])
    onnxruntime.build(out / "onnx", out / "engine")
    return torch.as_tensor(OnnxRuntimeEngine(out / "engine").logits(APART))


def test_engines_are_what_was_measured(tmp_path: Path) -> None:
    """With either embedding, by the point of the curve that was chosen; and what costs too much stays in float."""
    case = Case("llama-tied", tmp_path)
    plan = planned(case, "plan", WANTED)
    facts, found = plan.facts, plan.facts.embedding
    assert found is not None
    assert facts.scheme == replace(SCHEME, float_linears=facts.scheme.float_linears)
    assert found.in_float in facts.curve
    assert found.in_float.share == found.in_int8.share > 0
    wanted, cost = case.logits(APART), found.in_int8.kl - found.in_float.kl
    for scheme, outcome in ((facts.scheme, found.in_int8), (replace(facts.scheme, embedding=FLOAT), found.in_float)):
        made = logits(case, plan, scheme, tmp_path / scheme.embedding.dtype)
        assert kl_of(wanted, made) == pytest.approx(outcome.kl, abs=abs(cost) / 5)
    limited = planned(case, "limited", replace(WANTED, embedding_limit=cost - abs(cost) / 100)).facts
    assert limited.embedding == found
    assert limited.scheme == replace(facts.scheme, embedding=FLOAT)


def test_one_tied_to_a_float_head(tmp_path: Path) -> None:
    """Is not looked at where it must be worth it, and is in INT8 where that was asked for."""
    case, scheme = Case("llama-tied", tmp_path), replace(SCHEME, head=FLOAT)
    limited = planned(case, "limited", Wanted(scheme, SETTINGS, embedding_limit=1.0)).facts
    assert (limited.embedding, limited.scheme.embedding) == (None, FLOAT)
    assert planned(case, "asked", Wanted(scheme, SETTINGS)).facts.scheme == scheme
