"""The role of a linear in a layer: its kind, and the expert that it is of."""

from __future__ import annotations

import functools

ROUTER = "router"  # chooses the experts: smoothed with them, never quantized
LINEARS = ("q", "k", "v", "o", "gate", "up", "down", ROUTER)  # roles of linears
NORMS = (  # roles of norms, in the order in which a layer runs them
    "attention",
    "queries",
    "keys",
    "query",
    "key",
    "attention_output",
    "attention_residual",
    "mlp",
    "mlp_output",
    "mlp_residual",
)


class Role(str):
    """kind: "q", "k", "v", "o", "gate", "up", "down" or "router"; expert: None where all tokens share the linear.

    A string as well, "gate" or "gate.3": the key of a layer's weights, and what files and messages say.
    """

    kind: str
    expert: int | None

    def __new__(cls, kind: str, expert: int | None = None) -> Role:
        role = super().__new__(cls, kind if expert is None else f"{kind}.{expert}")
        role.kind, role.expert = kind, expert
        return role


@functools.cache
def parsed(role: str) -> Role:
    """The role that a string spells: parsed("gate.3") is Role("gate", 3). The one place that takes roles apart."""
    kind, _, expert = role.partition(".")
    return Role(kind, int(expert) if expert else None)
