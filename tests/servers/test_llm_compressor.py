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

READ = ("gptq", "gptq static", "rounded per tensor")
REFUSED = {  # form -> the key that says it
    "asymmetric": "input_activations.symmetric is false",
    "4 bits": "weights.num_bits is 4",
}
STATIC = ("gptq static", "rounded per tensor")
FLIPS = 0.05  # one of 10^5 roundings that goes the other way is about 1 % of the error of quantization


@pytest.fixture(scope="module")
def tool(tmp_path_factory: pytest.TempPathFactory) -> Quantizer:
    return Quantizer(LLM_COMPRESSOR, tmp_path_factory.mktemp("llm-compressor"), (*READ, *REFUSED))


@pytest.mark.parametrize("form", READ)
@pytest.mark.parametrize("layout", LAYOUTS)
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


@pytest.mark.parametrize("form", READ)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_its_logits_are_those_of_transformers(layout: str, form: str, tool: Quantizer) -> None:
    """Static activations round to the same numbers. Dynamic ones round to another grid: two independent errors."""
    off, error = ours_and_theirs(tool.made[layout, form], open_model(tool.models[layout]))
    assert off < (FLIPS if form in STATIC else math.sqrt(2)) * error


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_doubled_scale_is_seen_where_it_is(layout: str, tool: Quantizer, tmp_path: Path) -> None:
    model = open_model(tool.models[layout])
    before = one(tool.made[layout, "gptq"], model)
    for linear in before.linears:
        if linear.layer == 1:
            found = one(doubled(tool.made[layout, "gptq"], linear.name, tmp_path / linear.role), model)
            assert found.worst[0].name == linear.name
            assert found.worst[0].sqnr < 1 < found.worst[1].sqnr


@pytest.mark.parametrize("form", REFUSED)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_not_computed_as_written_is_refused_by_name(
    layout: str, form: str, tool: Quantizer, record_property: Callable[[str, object], None]
) -> None:
    found = tool.command(layout, form)
    assert (found.returncode, found.stdout) == (2, "")
    line = found.stderr.splitlines()[-1]  # behind a warning of a short text
    assert REFUSED[form] in line
    record_property("llm-compressor", [layout, form, f"refused: {REFUSED[form]}"])
