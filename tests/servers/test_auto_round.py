"""AutoRound's INT8 folders, whose scales may be negative: the command reports on them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file

from recipes.families import open_model
from tests.servers.environments import AUTO_ROUND
from tests.servers.quantizers import LAYOUTS, Quantizer, doubled, one, ours_and_theirs

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(AUTO_ROUND.python is None, reason="python -m tests.servers auto-round makes it"),
]

READ = ("rounded", "tuned")
NAMES = tuple((layout, form) for layout in LAYOUTS for form in (*READ, "4 bits"))
REFUSED = "quant_method 'auto-round'"  # 4 bits in AutoRound's own form


@pytest.fixture(scope="module")
def tool(tmp_path_factory: pytest.TempPathFactory) -> Quantizer:
    return Quantizer(AUTO_ROUND, tmp_path_factory.mktemp("auto-round"), NAMES)


@pytest.mark.parametrize("form", READ)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_command_reports_on_it(
    layout: str, form: str, tool: Quantizer, record_property: Callable[[str, object], None]
) -> None:
    found = tool.command(layout, form, "--no-thresholds", "--json")
    assert found.returncode == 0, found.stderr
    (validation,) = json.loads(found.stdout)["validations"]
    assert (validation["unexplained"], len(validation["worst"])) == ("", 5)
    worst, kl = validation["worst"][0], validation["metrics"]["kl_mean"]
    record_property("auto-round", [layout, form, f"KL {kl:.2g}, {worst['role']} {worst['sqnr']:.1f} dB"])


@pytest.mark.parametrize("form", READ)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_its_logits_are_those_of_transformers(layout: str, form: str, tool: Quantizer) -> None:
    """Dynamic activations round to another grid there: two independent errors."""
    folder = tool.made[layout, form]
    scales = [tensor for name, tensor in load_file(folder / "model.safetensors").items() if "weight_scale" in name]
    assert any((scale < 0).any() for scale in scales)
    off, error = ours_and_theirs(folder, open_model(tool.models[layout]))
    assert off < math.sqrt(2) * error


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_doubled_scale_is_seen_where_it_is(layout: str, tool: Quantizer, tmp_path: Path) -> None:
    model = open_model(tool.models[layout])
    for linear in one(tool.made[layout, "tuned"], model).linears:
        if linear.layer == 1:
            found = one(doubled(tool.made[layout, "tuned"], linear.name, tmp_path / linear.role), model)
            assert found.worst[0].name == linear.name
            assert found.worst[0].sqnr < 1 < found.worst[1].sqnr


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_not_computed_as_written_is_refused_by_name(
    layout: str, tool: Quantizer, record_property: Callable[[str, object], None]
) -> None:
    found = tool.command(layout, "4 bits")
    assert (found.returncode, found.stdout) == (2, "")
    line = found.stderr.splitlines()[-1]  # behind a warning of a short text
    assert REFUSED in line
    record_property("auto-round", [layout, "4 bits", f"refused: {REFUSED}"])
