"""The smoothing settings, which every step records."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING

from smoothquant.errors import UserError

if TYPE_CHECKING:  # the command line reads this module before it needs torch
    from smoothquant.family import SmoothingGroup

GRAPH_FACTS = "smoothquant"  # the key of an ONNX graph's metadata that holds facts about the export, as JSON

GROUPS = ("default", "paper", "none")  # any format can hold these, since they leave nothing for run time
RUN_TIME_GROUPS = ("run-time", "unfolded")  # only for engines that smooth an activation themselves
SMOOTHER_DTYPES = ("float16", "bfloat16", "float32")
CACHES = ("none", "own", "shared")


@dataclass(frozen=True)
class SmoothingSettings:
    """The settings of smoothing.

    alpha: migration strength in [0, 1]: 0 leaves the activations alone, 1 moves all of their range to the weights.
    groups: "default" smooths norm -> linears, v -> o and up -> down; "paper" is norm -> q, k, v and
        norm -> gate, up only, by the released code's formula to the letter; "none" quantizes without smoothing.
        "run-time" folds into the norms, and lets the engine divide the input of every other linear by a scale of its
        own; "unfolded" leaves the norms as they are and lets the engine divide every input.
    smoother_dtype: the dtype of the run-time scales in the engine.
    cache: the 8-bit KV cache that smoothing is for, "none" for none. For others all channels of keys are made to reach
        equally far (but for the groups "paper" and "none"): "own" where keys and values have a scale each, "shared"
        where they have one together, for which v -> o is folded such that both reach equally far.
    """

    alpha: float = 0.5
    groups: str = "default"
    smoother_dtype: str = "float32"
    cache: str = "none"

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise UserError(f"alpha {self.alpha}", expected="a number in [0, 1]", do="0.5 to 0.9 suit most models")
        for what, found, known in (
            ("groups", self.groups, GROUPS + RUN_TIME_GROUPS),
            ("smoother dtype", self.smoother_dtype, SMOOTHER_DTYPES),
            ("KV cache", self.cache, CACHES),
        ):
            if found not in known:
                raise UserError(f"{what} {found!r}", expected=f"one of {', '.join(known)}")

    @property
    def at_run_time(self) -> bool:
        """Whether the engine divides inputs at run time."""
        return self.groups in RUN_TIME_GROUPS

    @property
    def smooths_keys(self) -> bool:
        """Whether the keys of the KV cache are smoothed."""
        return "none" not in (self.cache, self.groups) and self.groups != "paper"

    def alpha_of(self, group: SmoothingGroup) -> float:
        """The migration strength of one group."""
        return self.alpha

    def chosen(self, groups: tuple[SmoothingGroup, ...], roles: tuple[str, ...]) -> tuple[SmoothingGroup, ...]:
        """The groups that these settings smooth. groups: a family's smoothing groups. roles: the roles of the linears
        that get quantized."""
        norms = tuple(group for group in groups if group.through == "norm")
        if self.at_run_time:
            fed = {role for group in norms for role in group.linears}
            alone = tuple(replace(groups[0], linears=(role,)) for role in roles if role not in fed)
            divided = alone if self.groups == "run-time" else norms + alone
            kept = norms if self.groups == "run-time" else ()
            return kept + tuple(replace(group, source="", through="run-time") for group in divided)
        return {"paper": norms, "default": groups, "none": ()}[self.groups]

    def as_dict(self) -> dict:
        """The settings as JSON values."""
        return asdict(self)

    def words(self) -> dict:
        """The settings for reports: alpha, groups, and all others that differ from the default."""
        others = {name: value for name, value in self.as_dict().items() if value != getattr(SmoothingSettings, name)}
        return {"alpha": self.alpha, "groups": self.groups} | others
