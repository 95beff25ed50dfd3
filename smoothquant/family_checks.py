"""Checks of a family's record and of the numbers that it reads, before any tensor is looked at."""

from __future__ import annotations

from collections.abc import Collection

from smoothquant.activations import ACTIVATIONS
from smoothquant.config_keys import SIZE
from smoothquant.errors import CheckpointError
from smoothquant.family import THROUGH, Family, Geometry
from smoothquant.norms import KINDS
from smoothquant.roles import LINEARS, NORMS, ROUTER
from smoothquant.values import RESTORE

PARTS = 2**17  # MLPs of a model, at most: ten times those of the largest
NUMBERS = ("hidden_size", "intermediate_size", "layers", "heads", "kv_heads", "head_dim", "vocab_size")


def check_numbers(family: Family, geometry: Geometry, config: str) -> None:
    """Raise CheckpointError for numbers that no model has, before anything is made of them. config: names the file."""
    for name in NUMBERS:
        SIZE.check(getattr(geometry, name), f"{config}: {name} by the family {family.name}")
    parts = geometry.layers * max(1, geometry.experts)
    if parts > PARTS:
        raise CheckpointError(
            f"{config}: {geometry.layers} layers of {geometry.experts} experts",
            expected=f"at most {PARTS} MLPs in all",
            do=RESTORE,
        )
    if geometry.heads % geometry.kv_heads:
        raise CheckpointError(
            f"{config}: {geometry.heads} attention heads over {geometry.kv_heads} kv heads",
            expected="a multiple",
            do=RESTORE,
        )
    if geometry.activation not in tuple(ACTIVATIONS):
        raise CheckpointError(
            f"{config}: activation {geometry.activation!r} is not supported",
            expected=f"one of {', '.join(ACTIVATIONS)}",
            do="export a model with one of these",
        )
    if ROUTER in family.linears and not 0 < geometry.experts_per_token <= geometry.experts:
        raise CheckpointError(
            f"{config}: {geometry.experts_per_token} experts per token of {geometry.experts}",
            expected="at least 1, and no more than there are",
            do=RESTORE,
        )


def check_record(family: Family) -> None:
    """Raise CheckpointError for names in a record that mean nothing."""
    named: list[tuple[str, str, Collection[str]]] = [("norm", family.norm, KINDS)]
    named += [("a norm's role", role, NORMS) for role in family.norms]
    named += [("a linear's role", role, LINEARS) for role in family.linears]
    for group in family.groups:
        sources = family.norms if group.through == "norm" else family.linears
        named += [("a group's through", group.through, THROUGH), ("a group's source", group.source, sources)]
        named += [("a group's linear", role, family.linears) for role in group.linears]
    for what, value, known in named:
        if value not in known:
            raise CheckpointError(
                f"family {family.name}: {what} {value!r}",
                expected=f"one of {', '.join(known)}",
                do="correct the family record",
            )
