"""Which linears stay in float where activations have static scales: those that rounding hurts most.

A static scale spends its 127 steps on the largest channel. Where a spike reaches far beyond all others, as before a few
down_proj, little of the rest is left, and no fold may reach it. `sensitivity` estimates the loss of every input.

    auto    those with a loss above LIMIT
    N%      by loss per byte, as many as a budget buys: N % of the bytes that all linears of the decoder have in INT8.
            A linear in float costs its INT8 bytes once more in 16 bits, and three times more in 32

LIMIT comes from SmolLM2-135M (alpha .85, WikiText-2): with nothing, 9.2 % (LIMIT) and 24.9 % of the bytes in float, the
KL is .037, .015 and .006 (`tests/benchmarks/float_budget.py`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from smoothquant.errors import UserError
from smoothquant.memory import UNLIMITED, Budget
from smoothquant.model import Model
from smoothquant.roles import parsed
from smoothquant.sensitivity import SharedInput, measured, quantized_inputs
from smoothquant.settings import SmoothingSettings
from smoothquant.steps import DEFAULT, Step

LIMIT = 1e-3  # the loss (`sensitivity.SharedInput`) above which "auto" keeps linears in float
BUDGET = re.compile(r"(\d{1,3}(?:\.\d+)?)%")


def linears_to_keep(
    choice: str,
    model: Model,
    input_absmax: Mapping[str, Tensor] | None,
    settings: SmoothingSettings,
    input_mean_square: Mapping[str, Tensor] | None = None,
    steps: Sequence[Step] = DEFAULT,
    progress: Callable[[int, int], None] = lambda done, total: None,
    memory: Budget = UNLIMITED,
) -> tuple[str, ...]:
    """Module names, in order, of the linears that a user wants in float. Linears that read one input stay together.

    choice: "auto"; "none"; a budget, as in "5%"; or roles, as in "down" or "o,down". input_absmax, input_mean_square:
    every linear's, unsmoothed, float32 (in,); the mean squares are guessed where there are none. memory: what may be in
    memory.
    Raises UserError for a role that the model does not have, and for a budget that buys nothing or everything.
    """
    budget = budget_of(choice)
    if choice == "none" or input_absmax is None:
        return ()
    if budget is None and choice != "auto":
        return _of_kinds(choice.split(","), model)
    inputs = measured(model, input_absmax, input_mean_square or {}, settings, steps, progress, memory)
    if budget:
        check_budget(choice, budget, [one.numbers for one in inputs])
    chosen = worth(inputs, budget) if budget else {one for one in inputs if one.loss > LIMIT}
    return tuple(dict.fromkeys(name for one in inputs if one in chosen for name in one.names))


def numbers_of(model: Model, names: Sequence[str] | None = None) -> int:
    """How many numbers the weights of these linears have, a byte each in INT8. names: None for all of the decoder."""
    return sum(rows * columns for name, (rows, columns) in model.linears() if names is None or name in names)


def budget_of(choice: str) -> float | None:
    """The share of the bytes that "N%" stands for; None for a choice that is no budget."""
    if "%" not in choice:
        return None
    found = BUDGET.fullmatch(choice)
    budget = float(found[1]) / 100 if found else 0.0
    if not 0 < budget < 1:
        raise UserError(
            f"a budget of {choice!r} for linears in float",
            expected="above 0% and below 100% of the bytes that all of them have in INT8, as in 5%",
        )
    return budget


def worth(inputs: Sequence[SharedInput], budget: float) -> set[SharedInput]:
    """The inputs that lose most per byte, while the budget lasts; one that no longer fits is passed over.

    budget: the share of the bytes that all inputs' linears have in INT8.
    """
    left, chosen = budget * sum(one.numbers for one in inputs), set()
    for one in sorted(inputs, key=lambda one: one.loss / one.numbers, reverse=True):
        if one.numbers <= left and one.loss > 0:
            left -= one.numbers
            chosen.add(one)
    return chosen


def check_budget(choice: str, budget: float, sizes: Sequence[int]) -> None:
    """Raise UserError for a budget that buys nothing. choice: its share as "5%" spells it. sizes: the bytes of all
    inputs' linears."""
    if budget * sum(sizes) < min(sizes):
        raise UserError(
            f"a budget of {choice} for linears in float, which none of this model fits into",
            expected=f"at least {min(sizes) / sum(sizes):.2%}, its smallest",
            do="give more, or none",
        )


def _of_kinds(asked: Sequence[str], model: Model) -> tuple[str, ...]:
    kinds = {parsed(role).kind for role in model.quantized_roles}
    for role in asked:
        if role not in kinds:
            raise UserError(
                f"linears {role!r} to keep in float",
                expected=f"auto, none, a budget as in 5%, or of {', '.join(sorted(kinds))}",
            )
    groups = [roles for roles in quantized_inputs(model) if any(parsed(role).kind in asked for role in roles)]
    names = (model.linear(layer, role) for layer in range(model.geometry.layers) for roles in groups for role in roles)
    return tuple(dict.fromkeys(names))
