"""What float16 must hold: maxima that hooks on transformers' own models see, and what is refused for them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from smoothquant import float16
from smoothquant.errors import UserError
from smoothquant.float16 import HeldMaxima, beyond, check_held, check_layer
from smoothquant.model import Model
from smoothquant.settings import SmoothingSettings
from smoothquant.stream import smooth_layer
from smoothquant.sweep import sweep
from tests.models import hooked_absmax, open_llama, sample_ids, scale_tensors, stretch_residual


def held(model: Model, sequences: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    found = HeldMaxima(model)
    return found.with_head(sweep(model, sequences, [found]))


def hooked(model: Model, sequences: Sequence[torch.Tensor], branches: Sequence[str]) -> dict[str, float]:
    """The same by the plainest means: what goes into and out of transformers' layers, between their branches (norms
    whose input it is), and out of the matrices that end a branch. branches: ends of the names of both kinds of module.
    """
    loaded = AutoModelForCausalLM.from_pretrained(model.checkpoint.folder, dtype=torch.float32).eval()
    found: dict[str, float] = dict.fromkeys((*float16.layers(model), "lm_head"), 0.0)

    def note(name: str, *seen: torch.Tensor) -> None:
        found[name] = max(found[name], *(x.abs().max().item() for x in seen))

    def layer_of(name: str) -> str:
        return next(layer for layer in float16.layers(model) if name.startswith(layer + "."))

    def listen(name: str, into: bool) -> Callable:
        return lambda _module, args, y: note(name, args[0] if into else y)

    for name, module in loaded.named_modules():
        if name in found and name != "lm_head":
            module.register_forward_hook(
                lambda _module, args, y, name=name: note(name, args[0], y[0] if isinstance(y, tuple) else y)
            )
        elif name.endswith(tuple(branches)):
            module.register_forward_hook(listen(layer_of(name), into="norm" in name))
    with torch.no_grad():
        for sequence in sequences:
            note("lm_head", loaded(sequence[None]).logits)
    return found


@pytest.mark.parametrize("reach", [1e3, 1e5])
def test_maxima_are_those_of_transformers(reach: float, make_llama: Callable[..., Path]) -> None:
    folder = stretch_residual(make_llama(), reach)
    model, sequences = open_llama(folder), [*sample_ids(4, 48), sample_ids(1, 7)[0]]
    found = held(model, sequences)
    expected = hooked(model, sequences, ("post_attention_layernorm", "o_proj", "down_proj"))
    assert found.keys() == expected.keys()
    for name in float16.layers(model):
        assert found[name].item() == pytest.approx(expected[name], rel=1e-5)
        assert found[name].item() == pytest.approx(reach, rel=0.2)  # on other text than it was stretched for
    # a bound on the logits: no less than they are, and no more than what lies along a row could be
    assert expected["lm_head"] <= found["lm_head"].item() <= 30 * expected["lm_head"]


def test_branches_count_before_they_are_added(make_llama: Callable[..., Path]) -> None:
    """One that is undone by what it is added to overflows all the same."""
    model, ids = open_llama(make_llama(num_hidden_layers=1)), [sample_ids(1, 16)[0]]
    found = HeldMaxima(model)
    found.enter(SimpleNamespace(index=0))  # type: ignore[arg-type]
    found.residual(torch.tensor([[[3.0, -5.0]]]))
    found.listen("gate", torch.zeros(1), torch.tensor([99.0]))  # no branch ends here
    found.listen("down", torch.zeros(1), torch.tensor([-7.0]))
    found.leave()
    assert found.found["model.layers.0"].item() == 7
    assert held(model, ids)["model.layers.0"] > 0


def test_logits_beyond_the_bound_are_computed(make_llama: Callable[..., Path]) -> None:
    folder = make_llama()
    model, sequences = open_llama(folder), [*sample_ids(2, 40)]
    loud = open_llama(scale_tensors(folder, {"lm_head.weight": 3e4}))
    expected = hooked(loud, sequences, ())["lm_head"]
    assert expected > float16.LARGEST / 2
    assert held(loud, sequences)["lm_head"].item() == pytest.approx(expected, rel=1e-5)
    assert "what goes into or out of lm_head reaches" in beyond(loud, held(loud, sequences))
    assert not beyond(model, {"lm_head": torch.tensor([float16.LARGEST])})


def test_the_margin_is_a_quarter(llama: Model) -> None:
    for reach, refused in ((52000.0, False), (53000.0, True), (1e5, True)):
        found = {"model.layers.0": torch.ones(1), "model.layers.1": torch.tensor([reach])}
        assert bool(beyond(llama, found)) == (reach > float16.LARGEST)
        if not refused:
            check_held(llama, found, "out", "use another")
            continue
        with pytest.raises(UserError) as caught:
            check_held(llama, found, "out", "use another")
        assert str(caught.value) == (
            f"out: float16 cannot hold this model: the residual stream of model.layers.1 reaches {reach:.3g}; expected "
            "at most 52403: other text may reach further, and float16 ends at 65504; use another"
        )


@pytest.mark.parametrize(
    ("groups", "refused"), [("default", False), ("none", True), ("paper", True), ("run-time", True)]
)
def test_what_lies_within_a_branch_is_looked_at_as_it_is_folded(
    groups: str, refused: bool, make_llama: Callable[..., Path]
) -> None:
    """Folded into up, the scale of down makes the product small; a run-time smoother divides what is too large."""
    layer = "model.layers.1.mlp."
    folder = scale_tensors(make_llama(), {f"{layer}up_proj.weight": 2.0**20, f"{layer}down_proj.weight": 2.0**-20})
    model = open_llama(folder)
    assert not beyond(model, held(model, [sample_ids(1, 32)[0]]), float16.MARGIN)
    smoothed = smooth_layer(model, 1, hooked_absmax(folder, sample_ids()), SmoothingSettings(groups=groups))
    if refused:
        with pytest.raises(UserError, match=r"the input of model\.layers\.1\.mlp\.down_proj reaches .*, smoothed"):
            check_layer(smoothed, "out", "use another")
    else:
        check_layer(smoothed, "out", "use another")


def test_outputs_count_as_they_are_divided(make_llama: Callable[..., Path]) -> None:
    model = open_llama(make_llama())
    absmax = hooked_absmax(model.checkpoint.folder, sample_ids())
    outputs = {name: torch.ones(rows) for name, (rows, _) in model.linears()}
    name = "model.layers.1.mlp.up_proj"
    for reach, refused in ((1.0, False), (1e7, True)):
        outputs[name] = torch.full((128,), reach)
        smoothed = smooth_layer(model, 1, absmax, SmoothingSettings(), outputs)
        if refused:
            with pytest.raises(UserError, match=rf"the output of {name} reaches .*, smoothed"):
                check_layer(smoothed, "out", "use another")
        else:
            check_layer(smoothed, "out", "use another")
