"""The smoothing that a format can hold. All smoothing settings are made here, from the options of a user."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from smoothquant.errors import UserError
from smoothquant.settings import GROUPS, RUN_TIME_GROUPS, SmoothingSettings

if TYPE_CHECKING:  # the command line reads this module before it needs torch
    from smoothquant.model import Model


@dataclass(frozen=True)
class Capacity:
    """The smoothing that a format can hold.

    name: the name of the format or of its engines in errors.
    groups: the choices of groups that it can hold; "default" stands for the first.
    smoother_dtype: the dtype of run-time scales in its engines.
    cache: its KV cache, as in `SmoothingSettings`.
    """

    name: str = "engines that smooth nothing themselves"
    groups: tuple[str, ...] = GROUPS
    smoother_dtype: str = SmoothingSettings.smoother_dtype
    cache: str = SmoothingSettings.cache

    def settings(self, model: Model, alpha: float | None = None, groups: str | None = None) -> SmoothingSettings:
        """The smoothing settings for a user's options; None stands for the default.

        Raises UserError for settings that the format or the model cannot hold.
        """
        usual = self.groups[0]
        groups = usual if groups is None or groups == "default" else groups
        divides = groups in RUN_TIME_GROUPS or usual in RUN_TIME_GROUPS  # by ones if nothing is smoothed
        settings = SmoothingSettings(
            SmoothingSettings.alpha if alpha is None else alpha,
            groups,
            self.smoother_dtype if divides else SmoothingSettings.smoother_dtype,
            self.cache,
        )
        self.check(settings, model)
        return settings

    def check(self, settings: SmoothingSettings, model: Model) -> None:
        """Raise UserError for settings that the format or the model cannot hold."""
        if settings.groups not in self.groups:
            usual, *others = self.groups
            raise UserError(
                f"smoothing groups {settings.groups!r} with {self.name}",
                expected=f"one of {', '.join((f'{usual} (the default)', *others))}",
            )
        if settings.at_run_time and settings.smoother_dtype != self.smoother_dtype:
            raise UserError(
                f"run-time scales in {settings.smoother_dtype} with {self.name}",
                expected=f"the engine's {self.smoother_dtype}",
            )
        if "shared" in (settings.cache, self.cache) and settings.cache != self.cache:  # keys may always be smoothed
            raise UserError(
                f"smoothing for a KV cache {settings.cache!r} with {self.name}", expected=f"one for {self.cache!r}"
            )
        if settings.groups != "none" and not settings.chosen(model.groups, model.quantized_roles):
            raise UserError(
                f"smoothing groups {settings.groups!r} with family {model.family.name}, which has no such folds",
                expected="groups that the family's record names",
                do="leave --groups away, or give none for plain quantization",
            )


FOLDED = Capacity()  # any format can hold this much
FOR_CACHE = Capacity(cache="own")  # and this, for an 8-bit KV cache in which keys and values have a scale each
