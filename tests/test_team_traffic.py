"""The table of what ranks say to each other: its formula beside what a calibration really puts together."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from act_scales.collect import collect
from act_scales.text import Text
from recipes.families import open_model
from smoothquant.team import Team
from tests.benchmarks.team_traffic import MODELS, llama, seconds, speedups
from tests.models import sample_ids, save_llama


class CountingTeam(Team):
    """A process alone that counts the bytes that it would send."""

    def largest(self, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        SENT.append(sum(values.nbytes for values in found.values()))
        return super().largest(found)

    total = largest


SENT: list[int] = []


def test_a_calibration_sends_what_the_formula_says(tmp_path: Path) -> None:
    model = open_model(save_llama(tmp_path / "llama"))
    geometry = model.geometry
    SENT.clear()
    collect(model, Text(tuple(sample_ids()), "drawn"), tmp_path / "out.safetensors", device="cpu", team=CountingTeam())
    shapes = llama(geometry.hidden_size, geometry.kv_size, geometry.intermediate_size)
    further = 4 + 8 * 7  # of the residual stream, and the weight of the squares of seven linears
    assert sum(SENT) == geometry.layers * (shapes.maxima + further) + 8  # two numbers of the head


def test_predictions_follow_from_sizes() -> None:
    seven = MODELS["Llama-2-7B"]
    assert seven.weights * 32 == 6_476_005_376  # of 6,738,415,616 parameters, without embedding, head and norms
    assert 7 < speedups(seven, "calibrate")[8] < 8
    assert seconds(seven, "search", 8, "PCIe") > seconds(seven, "search", 8, "NVLink")
