"""A planned head leaves the function as it is in float, computes what its integers say in INT8, and is checked."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from smoothquant import decoder
from smoothquant.artifacts.plan import HEAD
from smoothquant.attention import patterns
from smoothquant.contract import relative_error
from smoothquant.errors import UserError
from smoothquant.head import PlannedHead, head_logits, is_smoothable, smoothed_logits
from smoothquant.layers import float_layer
from smoothquant.model import Model
from smoothquant.plan import read_plan
from smoothquant.quantization import quantize_weight
from smoothquant.scheme import PER_TOKEN, scheme_of
from tests.families.case import Case
from tests.models import sample_ids
from tests.outputs import agree
from tests.plans import planned_head, write_plan

LAYOUTS = ("llama", "llama-tied", "opt", "bloom", "gemma2", "gemma3", "granite")
INT8_HEAD = scheme_of("per-token", head="int8")
IDS = sample_ids(2, 24, seed=5)


@torch.no_grad()
def states(model: Model) -> Tensor:
    """Behind the last layer of the float model, float64 (tokens, hidden)."""
    hidden, positions = decoder.embed(model, IDS, torch.float64), patterns(model, IDS.shape[1], torch.float64)
    for index in range(model.geometry.layers):
        hidden = decoder.forward(model, float_layer(model, index), hidden, positions)
    return hidden.flatten(0, 1)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_folded_scale_leaves_the_function(name: str, tmp_path: Path) -> None:
    """Against transformers; the scale is not near 1, and its norm and weight are float32 or less."""
    case = Case(name, tmp_path)
    planned = planned_head(case.model, torch.Generator().manual_seed(1))
    assert planned.smoothing_scale is not None
    assert planned.smoothing_scale.max() > 2 * planned.smoothing_scale.min()
    hidden = states(case.model)
    found = smoothed_logits(case.model, hidden, planned)
    assert found.dtype == torch.float64
    assert relative_error(found, decoder.logits(case.model, hidden)) < 2e-7
    assert relative_error(found, case.logits(IDS).flatten(0, 1)) < 1e-5
    other = PlannedHead(planned.smoothing_scale * torch.linspace(1, 1.01, len(planned.smoothing_scale)))
    rows = torch.cat(list(other.smoothed_rows(case.model))).double()
    broken = decoder.finished(case.model, decoder.head_input(case.model, hidden, planned.norm(case.model)) @ rows.T)
    assert relative_error(broken, found) > 1e-5  # the control


@pytest.mark.parametrize("name", [*LAYOUTS, "opt-350m"])
def test_int8_logits_are_near_those_of_transformers(name: str, tmp_path: Path) -> None:
    """Scaled and capped as the family has it, smoothed at random and as it is."""
    case = Case(name, tmp_path)
    hidden, wanted = states(case.model).float(), case.logits(IDS).flatten(0, 1)
    scale = planned_head(case.model, torch.Generator().manual_seed(1)).smoothing_scale
    assert (scale is not None) == is_smoothable(case.model) == (name != "opt-350m")
    assert relative_error(head_logits(case.model, INT8_HEAD, hidden), wanted) < 0.05
    assert relative_error(head_logits(case.model, INT8_HEAD, hidden, PlannedHead(scale)), wanted) < 0.05
    assert head_logits(case.model, PER_TOKEN, hidden).equal(decoder.logits(case.model, hidden))


def test_the_head_of_a_plan_is_what_its_integers_say(tmp_path: Path) -> None:
    """Written out in float64, from the file alone."""
    case = Case("llama", tmp_path)
    plan = read_plan(write_plan(case.model, case.act_scales, tmp_path / "plan", INT8_HEAD)).for_model(case.model)
    stored, hidden = load_file(tmp_path / "plan" / HEAD), states(case.model)
    x = hidden / (hidden.square().mean(-1, keepdim=True) + case.model.geometry.norm_epsilon).sqrt()
    x = x * case.model.read("model.norm.weight").double() / stored["lm_head.smoothing_scale"].double()
    step = x.abs().amax(-1, keepdim=True) / 127
    weight = stored["lm_head.weight"].double() * stored["lm_head.weight_scale"].double()[:, None]
    expected = (x / step).round() * step @ weight.T
    found = head_logits(case.model, INT8_HEAD, hidden, plan.head(case.model))
    assert relative_error(found, expected) < 1e-6
    assert plan.head(case.model).tensors(case.model).keys() == stored.keys()


def without(*names: str) -> Callable[[dict[str, Tensor]], None]:
    def change(own: dict[str, Tensor]) -> None:
        for name in names:
            del own["lm_head." + name]

    return change


def put(name: str, tensor: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    def change(own: dict[str, Tensor]) -> None:
        own["lm_head." + name] = tensor(own["lm_head." + name])

    return change


BAD: dict[str, tuple[str, Callable[[dict[str, Tensor]], None], str]] = {
    "another tensor": (
        "llama",
        lambda own: own.update({"head.weight": own["lm_head.weight"].clone()}),
        "tensor head.weight; expected tensors of the output head of this model",
    ),
    "another shape": ("llama", put("weight", lambda own: own[1:].clone()), "tensor lm_head.weight is int8 [287, 64]"),
    "another dtype": ("llama", put("weight_scale", Tensor.double), "weight_scale is float64 [288]; expected float32"),
    "-128": ("llama", put("weight", lambda own: own.fill_(-128)), "lm_head.weight holds others than numbers within"),
    "a scale of 0": ("llama", put("smoothing_scale", torch.zeros_like), "holds others than finite numbers above 0"),
    "NaN": ("llama", put("weight_scale", lambda own: own * torch.nan), "holds others than finite numbers above 0"),
    "no weight_scale": ("llama", without("weight_scale"), "tensor lm_head.weight without lm_head.weight_scale"),
    "no weight": ("llama", without("weight"), "tensor lm_head.weight_scale without lm_head.weight; expected both"),
    "a scale behind a projection": (
        "opt-350m",
        lambda own: own.update({"lm_head.smoothing_scale": torch.ones(48)}),
        "tensor lm_head.smoothing_scale; expected tensors of the output head",
    ),
}


@pytest.mark.parametrize("fault", BAD)
def test_bad_files(fault: str, tmp_path: Path) -> None:
    name, change, said = BAD[fault]
    case = Case(name, tmp_path)
    folder = write_plan(case.model, case.act_scales, tmp_path / "plan", INT8_HEAD)
    own = load_file(folder / HEAD)
    change(own)
    save_file(own, folder / HEAD)
    agree(folder)
    with pytest.raises(UserError) as caught:
        read_plan(folder).for_model(case.model)
    assert f"{folder / HEAD}: " in str(caught.value)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_plan_without_its_head(tmp_path: Path) -> None:
    case = Case("llama", tmp_path)
    plan = read_plan(write_plan(case.model, case.act_scales, tmp_path / "plan", INT8_HEAD))
    (plan.folder / HEAD).unlink()
    with pytest.raises(UserError, match=r"head.safetensors: cannot be read .*; expected the output head of a plan"):
        plan.for_model(case.model)


def test_parts_of_the_file_may_be_missing(tmp_path: Path) -> None:
    """Nothing folded, or rounded to nearest, or both."""
    case = Case("llama", tmp_path)
    folder = write_plan(case.model, case.act_scales, tmp_path / "plan", INT8_HEAD)
    whole = load_file(folder / HEAD)
    for kept in (("smoothing_scale",), ("weight", "weight_scale"), ()):
        save_file({f"lm_head.{name}": whole[f"lm_head.{name}"] for name in kept}, folder / HEAD)
        agree(folder)
        head = read_plan(folder).for_model(case.model).head(case.model)
        assert (head.smoothing_scale is None) == (head.norm(case.model) is None) == ("smoothing_scale" not in kept)
        weight, scale = (torch.cat(parts) for parts in zip(*head.int8_rows(case.model), strict=True))
        column = 1 if head.smoothing_scale is None else head.smoothing_scale
        nearest = quantize_weight(case.model.read("lm_head.weight") * column)
        expected = (whole["lm_head.weight"], whole["lm_head.weight_scale"]) if "weight" in kept else nearest
        assert weight.equal(expected[0])
        assert scale.equal(expected[1])
