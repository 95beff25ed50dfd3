"""How to smooth: the settings that every step records."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from smoothquant.errors import UserError

if TYPE_CHECKING:  # the command line reads this module before it needs torch
    from smoothquant.family import SmoothingGroup

# The file beside every export that records its smoothing, and the ends of its keys: <linear>.smoothing_scale,
# <linear>.input_absmax (of the smoothed input).
SMOOTHING = "smoothing.safetensors"
SCALE, ABSMAX = ".smoothing_scale", ".input_absmax"

GROUPS = ("default", "paper", "none")


@dataclass(frozen=True)
class SmoothingSettings:
    """How to smooth.

    alpha: migration strength in [0, 1]: 0 leaves the activations alone, 1 moves all of their range to the weights.
    groups: "default" smooths norm -> linears, v -> o and up -> down; "paper" is norm -> q, k, v and
        norm -> gate, up only, by the released code's formula to the letter; "none" quantizes without smoothing.
    """

    alpha: float = 0.5
    groups: str = "default"

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise UserError(f"alpha {self.alpha}", expected="a number in [0, 1]", do="0.5 suits most models")
        if self.groups not in GROUPS:
            raise UserError(f"groups {self.groups!r}", expected=f"one of {', '.join(GROUPS)}")

    def chosen(self, groups: tuple[SmoothingGroup, ...]) -> tuple[SmoothingGroup, ...]:
        """Those of a family's smoothing groups that these settings smooth."""
        if self.groups == "paper":
            return tuple(group for group in groups if group.through == "norm")
        return groups if self.groups == "default" else ()

    def as_dict(self) -> dict:
        return asdict(self)
