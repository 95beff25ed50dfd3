"""The W8A8 forms of a model that `real_weights` measures.

A form is a function that makes layers. It runs beside the float layers, with hidden states of its own. A new form needs
a name, a label and that function; `Setting` is the one for what the project's exports offer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from act_scales.search.budget import linears_asked
from act_scales.store import ActScales, load_act_scales
from builders.validate.int8_folder import open_int8_folder
from builders.validate.metrics import check_logits
from recipes.models import RECIPES
from recipes.recipe import of_model
from smoothquant.embedding import embedding_of
from smoothquant.head import UNPLANNED, PlannedHead, head_logits
from smoothquant.int8_layer import int8_layer
from smoothquant.layers import FloatLayer, Layer, W8A8Layer
from smoothquant.listener import Listener
from smoothquant.model import Model
from smoothquant.plan import read_plan
from smoothquant.quantization import quantize_input
from smoothquant.roles import ROUTER
from smoothquant.scheme import PER_TOKEN, Scheme, scheme_of
from smoothquant.settings import SmoothingSettings
from smoothquant.static import linears_to_keep, numbers_of
from smoothquant.stream import runnable, smooth_layer
from tests.benchmarks.real_measures import Measured, Predictions, rounded

ALPHAS = (0.5, 0.6, 0.7, 0.8)
RECIPE = "per-token-recipe"  # the row that all others are compared with
FLOORS = (0.6, 0.8)  # the alphas of the forms in which only one side is rounded
LayerOf = Callable[[Model, int, FloatLayer], Layer]


@dataclass(frozen=True)
class Form:
    """One form of a model.

    name: as in `--rows` and in the results. label: for tables. layer: makes a layer from the measured model, the
    layer's index and the stored layer. scheme: says how the output head computes. model: the model that embeds the
    tokens and holds the head; None for the measured one. head: what a plan says of a head in INT8.
    """

    name: str
    label: str
    layer: LayerOf
    scheme: Scheme = PER_TOKEN
    model: Model | None = None
    head: PlannedHead = UNPLANNED


class Beside(Listener):
    """A listener that runs one form beside the float layers, and keeps its measures sequence by sequence."""

    def __init__(self, model: Model, form: Form) -> None:
        self.model, self.form = model, form
        if form.model or form.scheme.embedding.quantized:
            self.embedding = embedding_of(form.model or model, form.scheme, form.head)
        self.forms = {form.name: torch.float32}
        self._kept: int | None = 0  # numbers of linears in float; None where layers are no W8A8 layers
        self._found: list[tuple[float, float, float]] = []

    def enter(self, source: FloatLayer) -> Mapping[str, Layer]:
        layer = self.form.layer(self.model, source.index, source)
        if not isinstance(layer, W8A8Layer):
            self._kept = None
        elif self._kept is not None:
            self._kept += sum(weight.numel() for role, weight in layer.float_weights.items() if role != ROUTER)
        return {self.form.name: layer}

    def add(self, reference: Predictions, hidden: Tensor) -> None:
        """Measure the next sequence. hidden: the form's hidden states after the last layer, (tokens, hidden).

        Raises ThresholdError for logits that are not finite.
        """
        logits = head_logits(self.form.model or self.model, self.form.scheme, hidden, self.form.head)
        check_logits(logits[None], len(hidden), self.model.geometry.vocab_size, len(self._found))
        self._found.append(reference.compare(logits))

    @property
    def measured(self) -> Measured:
        """The measures of all sequences."""
        kl, loss, agreeing = map(rounded, zip(*self._found, strict=True))
        share = None if self._kept is None else self._kept / numbers_of(self.model)
        return Measured(self.form.label, share, kl, loss, agreeing)


@dataclass(frozen=True)
class Setting:
    """Smoothing settings and a scheme, with the linears that stay in float by a choice of `--keep-float`. exact: the
    side that is not rounded, "weights" or "activations"; empty where both are."""

    name: str
    label: str
    smoothing: SmoothingSettings
    scheme: Scheme = PER_TOKEN
    keep_float: str = "none"
    exact: str = ""

    def form(self, model: Model, scales: ActScales) -> Form:
        """The form of a model by its act scales."""
        kept: tuple[str, ...] = ()
        if self.scheme.activations.static:
            absmax, mean_square = scales.input_absmax, scales.input_mean_square
            kept = linears_to_keep(self.keep_float, model, absmax, self.smoothing, mean_square)
        scheme = replace(self.scheme, float_linears=kept)
        return Form(self.name, self.label, self._layer(scales, scheme), scheme)

    def _layer(self, scales: ActScales, scheme: Scheme) -> LayerOf:
        def layer(model: Model, index: int, source: FloatLayer) -> Layer:
            smoothed = smooth_layer(
                model, index, scales.input_absmax, self.smoothing, scales.output_absmax, source=source
            )
            quantized = runnable(smoothed, scheme)
            if self.exact == "weights":
                return RoundedInputs(smoothed.in_float(), quantized)
            return _rounded(smoothed.in_float(), quantized) if self.exact == "activations" else quantized

        return layer


class RoundedInputs:
    """A float layer whose linears read inputs that have been rounded as those of its quantized form are."""

    def __init__(self, layer: FloatLayer, quantized: W8A8Layer) -> None:
        self.index, self.norms, self.cached = layer.index, layer.norms, layer.cached
        self._layer, self._quantized = layer, quantized

    def linear(self, role: str, x: Tensor) -> Tensor:
        if role in self._quantized.weights:
            integers, scale = quantize_input(x, self._quantized.activations, self._quantized.input_scales.get(role))
            x = integers * scale
        return self._layer.linear(role, x)


def recipe_alpha(model: Model) -> float:
    """The alpha of the recipe for a model; the default where there is no recipe."""
    recipe = of_model(model, RECIPES)
    return recipe.alpha if recipe else SmoothingSettings.alpha


def settings_of(model: Model) -> tuple[Setting, ...]:
    """The settings that the project offers today, for one model. Names and labels are the same for all models."""
    alpha, static = recipe_alpha(model), scheme_of("per-tensor")
    recipe, meant = SmoothingSettings(alpha), "the recipe's alpha"
    cached = replace(recipe, cache="own")
    others = [each for each in ALPHAS if each != alpha]
    return (
        Setting(RECIPE, f"per token, {meant}", recipe),
        *(Setting(f"per-token-{each}", f"per token, alpha {each}", SmoothingSettings(each)) for each in others),
        Setting("per-token-naive", "per token, not smoothed", SmoothingSettings(groups="none")),
        Setting("paper-recipe", f"per token, `--groups paper`, {meant}", SmoothingSettings(alpha, "paper")),
        Setting("paper-0.5", "per token, `--groups paper`, alpha 0.5", SmoothingSettings(0.5, "paper")),
        *(
            Setting(f"per-tensor-{keep}", f"per tensor, {meant}, `--keep-float {keep}`", recipe, static, keep)
            for keep in ("none", "auto", "10%", "25%")
        ),
        Setting("kv-int8", f"per token, {meant}, INT8 KV cache", cached, scheme_of("per-token", kv_cache="int8")),
        Setting("head-int8", f"per token, {meant}, INT8 head", recipe, scheme_of("per-token", head="int8")),
        *(
            Setting(
                f"exact-{side}-{each}",
                f"per token, alpha {each}, {side} not rounded",
                SmoothingSettings(each),
                exact=side,
            )
            for side in ("weights", "activations")
            for each in FLOORS
        ),
        Setting(
            "exact-weights-static",
            "per tensor, alpha 0.8, `--keep-float 10%`, weights not rounded",
            SmoothingSettings(0.8),
            static,
            "10%",
            exact="weights",
        ),
    )


def folder_form(name: str, folder: Path, model: Model) -> Form:
    """The form that an INT8 folder of another tool holds. Raises the errors of `open_int8_folder`."""
    _, scheme = open_int8_folder(folder, model)
    int8 = scheme.folder
    assert int8 is not None
    return Form(name, name, lambda _model, index, _source: int8_layer(int8, index), scheme.scheme, int8.model)


def plan_form(name: str, place: str, model: Model) -> Form:
    """The form of a search's plan. place: its folder, and behind @ the linears in float, "none" or a share, where these
    are not the plan's own. Raises the errors of `read_plan`, and UserError for a plan of another model."""
    folder, _, asked = place.partition("@")
    plan = read_plan(folder).for_model(model)
    scales = load_act_scales(plan.act_scales)
    scheme = replace(plan.facts.scheme, float_linears=linears_asked(plan, model, asked or None))

    def layer(model: Model, index: int, source: FloatLayer) -> Layer:
        smoothed = smooth_layer(
            model, index, scales.input_absmax, plan.facts.smoothing, scales.output_absmax, source=source, plan=plan
        )
        return runnable(smoothed, scheme)

    return Form(name, name, layer, scheme, head=plan.head(model))


def _rounded(layer: FloatLayer, quantized: W8A8Layer) -> FloatLayer:
    """A float layer with the weights of its quantized form, times their scales."""
    scales = quantized.weight_scales
    rounded = {role: weight * scales[role][:, None] for role, weight in quantized.weights.items()}
    return replace(layer, weights={**layer.weights, **rounded})
