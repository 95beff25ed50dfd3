"""The role of a linear in a layer: its kind and its expert."""

from __future__ import annotations

import functools

ROUTER = "router"  # the router chooses the experts; it is smoothed with them, but never quantized
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
    """The role of a linear. It is a string, too, "gate" or "gate.3", which is a key of a layer's weights.

    kind: "q", "k", "v", "o", "gate", "up", "down" or "router". expert: the index of the expert; None if all tokens
    share the linear.
    """

    kind: str
    expert: int | None

    def __new__(cls, kind: str, expert: int | None = None) -> Role:
        role = super().__new__(cls, kind if expert is None else f"{kind}.{expert}")
        role.kind, role.expert = kind, expert
        return role


@functools.cache
def parsed(role: str) -> Role:
    """The role that a string spells: parsed("gate.3") is Role("gate", 3). No other code takes roles apart."""
    kind, _, expert = role.partition(".")
    return Role(kind, int(expert) if expert else None)
