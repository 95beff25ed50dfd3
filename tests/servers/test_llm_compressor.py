"""llm-compressor's INT8 folders: the command reports on them, in the numbers that transformers computes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from recipes.families import open_model
from tests.servers.environments import LLM_COMPRESSOR
from tests.servers.quantizers import LAYOUTS, Quantizer, doubled, one, ours_and_theirs

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(LLM_COMPRESSOR.python is None, reason="python -m tests.servers llm-compressor makes it"),
]

FORMS = ("gptq", "gptq static", "rounded per tensor")
READ = tuple((layout, form) for layout in LAYOUTS for form in FORMS)
BROKEN = ("gemma3", "gptq static")  # smoothing is folded into the weight of its norms, and their gain is 1 + weight
REFUSED = {  # what says it
    ("llama", "asymmetric"): "input_activations.symmetric is false",
    ("llama", "4 bits"): "weights.num_bits is 4",
    ("mixtral", "gptq"): "experts.0.w1.weight is missing",  # it is written as gate_proj
}
STATIC = ("gptq static", "rounded per tensor")
FLIPS = 0.05  # one of 10^5 roundings that goes the other way is about 1 % of the error of quantization


@pytest.fixture(scope="module")
def tool(tmp_path_factory: pytest.TempPathFactory) -> Quantizer:
    return Quantizer(LLM_COMPRESSOR, tmp_path_factory.mktemp("llm-compressor"), (*READ, BROKEN, *REFUSED))


@pytest.mark.parametrize(("layout", "form"), READ)
def test_the_command_reports_on_it(
    layout: str, form: str, tool: Quantizer, record_property: Callable[[str, object], None]
) -> None:
    found = tool.command(layout, form, "--no-thresholds", "--json", "--report", tool.root / f"{layout}-{form}.html")
    assert found.returncode == 0, found.stderr
    (validation,) = json.loads(found.stdout)["validations"]
    assert (validation["unexplained"], len(validation["worst"])) == ("", 5)
    assert "Quantization error by layer" in (tool.root / f"{layout}-{form}.html").read_text()
    worst, kl = validation["worst"][0], validation["metrics"]["kl_mean"]
    assert worst["sqnr"] > 10
    record_property("llm-compressor", [layout, form, f"KL {kl:.2g}, {worst['role']} {worst['sqnr']:.1f} dB"])


@pytest.mark.parametrize(("layout", "form"), [*READ, BROKEN])
def test_its_logits_are_those_of_transformers(layout: str, form: str, tool: Quantizer) -> None:
    """Static activations round to the same numbers. Dynamic ones round to another grid: two independent errors."""
    off, error = ours_and_theirs(tool.made[layout, form], open_model(tool.models[layout]))
    assert off < (FLIPS if form in STATIC else math.sqrt(2)) * error


def test_a_folder_that_its_tool_broke(tool: Quantizer, record_property: Callable[[str, object], None]) -> None:
    """transformers computes the same from it (above). The linears behind the norms are named, and no others."""
    found = tool.command(*BROKEN, "--json")
    assert found.returncode == 1
    (validation,) = json.loads(found.stdout)["validations"]
    worst, kl = validation["worst"], validation["metrics"]["kl_mean"]
    assert worst[0]["sqnr"] < 0
    assert kl > 0.1
    assert {linear["role"] for linear in worst} <= {"q", "k", "v", "gate", "up"}
    record_property("llm-compressor", [*BROKEN, f"KL {kl:.2g}, {worst[0]['role']} {worst[0]['sqnr']:.1f} dB: broken"])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_doubled_scale_is_seen_where_it_is(layout: str, tool: Quantizer, tmp_path: Path) -> None:
    model = open_model(tool.models[layout])
    before = one(tool.made[layout, "gptq"], model)
    for linear in before.linears:
        if linear.layer == 1:
            found = one(doubled(tool.made[layout, "gptq"], linear.name, tmp_path / linear.role), model)
            assert found.worst[0].name == linear.name
            assert found.worst[0].sqnr < 1 < found.worst[1].sqnr


@pytest.mark.parametrize(("layout", "form"), REFUSED)
def test_what_is_not_computed_as_written_is_refused_by_name(
    layout: str, form: str, tool: Quantizer, record_property: Callable[[str, object], None]
) -> None:
    found = tool.command(layout, form)
    assert (found.returncode, found.stdout) == (2, "")
    line = found.stderr.splitlines()[-1]  # behind a warning of a short text
    assert REFUSED[layout, form] in line
    record_property("llm-compressor", [layout, form, f"refused: {REFUSED[layout, form]}"])
