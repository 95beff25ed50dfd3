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
    shared_cache_scale: whether its KV cache has one scale for keys and values.
    """

    name: str = "engines that smooth nothing themselves"
    groups: tuple[str, ...] = GROUPS
    smoother_dtype: str = SmoothingSettings.smoother_dtype
    shared_cache_scale: bool = False

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
            self.shared_cache_scale,
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
        if settings.shared_cache_scale != self.shared_cache_scale:
            raise UserError(
                f"smoothing with shared_cache_scale={settings.shared_cache_scale} with {self.name}",
                expected=f"{self.shared_cache_scale}: the scales of its KV cache",
            )
        if settings.groups != "none" and not settings.chosen(model.groups, model.quantized_roles):
            raise UserError(
                f"smoothing groups {settings.groups!r} with family {model.family.name}, which has no such folds",
                expected="groups that the family's record names",
                do="leave --groups away, or give none for plain quantization",
            )


FOLDED = Capacity()  # any format can hold this much
