"""Layers by the plan of a search: the scales to fold, and the weights as they were rounded.

layers/00000.safetensors        by module name, as matrices lie on disk
    <linear>.smoothing_scale    float32 (in,), if its input is smoothed
    <layer>.key.smoothing_scale float32 (kv_size,), if the keys of an 8-bit cache are smoothed
    <layer>.key.cache_scale     float32 scalar, of an 8-bit cache; the same for value
    <linear>.input_absmax       float32 (in,), maxima of the smoothed input
    <linear>.weight             int8 (out, in), if it was not rounded to nearest
    <linear>.weight_scale       float32 (out,), beside it
    <linear>.bias               float32 (out,), if it was corrected

head.safetensors                of the output head, where it is in INT8
    <head>.smoothing_scale      float32 (hidden,), if its input is smoothed
    <head>.weight               int8 (vocab, hidden), if it was not rounded to nearest
    <head>.weight_scale         float32 (vocab,), beside it
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from smoothquant.artifacts.plan import ACT_SCALES, HEAD, PLAN, STEP, PlanFacts
from smoothquant.artifacts.ports import CACHED, KEY
from smoothquant.artifacts.record import read
from smoothquant.artifacts.smoothing_file import ABSMAX, CACHE_SCALE, SCALE
from smoothquant.digests import combined
from smoothquant.errors import UserError, raise_refusal
from smoothquant.fold import Rounded, Scales
from smoothquant.head import UNPLANNED, PlannedHead
from smoothquant.int8_checkpoint import BIAS, WEIGHT, WEIGHT_SCALE
from smoothquant.kv_cache import Scales as CacheScales
from smoothquant.model import Model
from smoothquant.outputs import check_content, load_manifest
from smoothquant.plan_tensors import DO, check_head, check_tensors
from smoothquant.reading import read_object


def layer_file(index: int) -> str:
    """The name of a layer's file in the folder of a plan."""
    return f"layers/{index:05}.safetensors"


@dataclass(frozen=True)
class PlannedLayer:
    """What a plan says of one layer. scales: to fold. rounded: by role, the linears not rounded to nearest.
    cache_scales: of an 8-bit cache, if the plan has chosen them."""

    scales: Scales
    rounded: Mapping[str, Rounded]
    cache_scales: CacheScales | None = None

    def tensors(self, model: Model, index: int) -> dict[str, Tensor]:
        """The tensors of the layer's file, by name."""
        found: dict[str, Tensor] = {}
        if self.scales.keys is not None:
            found[model.family.module(index, KEY) + SCALE] = self.scales.keys.clone()
        for part, scale in zip(CACHED, self.cache_scales or (), strict=False):
            found[model.family.module(index, part) + CACHE_SCALE] = scale.clone()
        for name, roles in model.stored.items():
            full, first = model.family.module(index, name), roles[0]
            for end, values in ((SCALE, self.scales.column), (ABSMAX, self.scales.input_absmax)):
                if first in values:
                    found[full + end] = values[first].clone()
            parts = {role: self.rounded[role] for role in roles if role in self.rounded}
            if parts:
                found[full + WEIGHT] = model.join(name, {role: one.weight for role, one in parts.items()})
                found[full + WEIGHT_SCALE] = model.join(name, {role: one.weight_scale for role, one in parts.items()})
                biases = {role: one.bias for role, one in parts.items() if one.bias is not None}
                if biases:
                    found[full + BIAS] = model.join(name, biases)
        return found


@dataclass(frozen=True)
class Plan:
    """The plan in a folder. facts: its record. fingerprint: of all that its files hold."""

    folder: Path
    facts: PlanFacts
    fingerprint: str

    @property
    def float_linears(self) -> tuple[str, ...]:
        """Module names of the linears that stay in float."""
        return self.facts.scheme.float_linears

    @property
    def act_scales(self) -> Path:
        """The file of the ranges that the search measured."""
        return self.folder / ACT_SCALES

    def for_model(self, model: Model) -> Plan:
        """This plan, if it is this model's: the files of all layers and of the head are read. Raises UserError for
        another model's."""
        searched = "give the --max-length that the search was given, or search again"
        for what, found, ours, do in (
            ("model", self.facts.model, model.checkpoint.fingerprint, DO),
            ("family", self.facts.family, model.family.name, DO),
            ("max_positions", self.facts.max_positions, model.choices.get("max_positions"), searched),
        ):
            if found != ours:
                raise UserError(
                    f"{self.folder}: a plan for {what} {found}",
                    expected=f"one for {what} {ours}, that of {model.checkpoint.folder}",
                    do=do,
                )
        self._check_float_linears(model)
        for index in range(model.geometry.layers):
            self.layer(model, index)
        self.head(model)
        return self

    def _check_float_linears(self, model: Model) -> None:
        """Raise UserError for linears in float that the model does not have, and for some of those that read one
        input."""
        known, kept = {name for name, _ in model.linears()}, set(self.float_linears)
        for name in self.float_linears:
            if name not in known:
                raise UserError(f"{self.folder}: {name} in float", expected="linears of this model", do=DO)
        for index, roles in product(range(model.geometry.layers), model.side_by_side):
            names = {model.linear(index, role) for role in roles}
            if names & kept and names - kept:
                raise UserError(
                    f"{self.folder}: {min(names & kept)} stays in float, and {min(names - kept)} does not",
                    expected="linears that read one input together",
                    do=DO,
                )

    def layer(self, model: Model, index: int) -> PlannedLayer:
        """One layer of the plan. Raises UserError for a file that does not hold this model's layer."""
        path = self.folder / layer_file(index)
        found = _load(path, "a layer of a plan")
        check_tensors(model, index, self.facts.smoothing, found, str(path))
        column: dict[str, Tensor] = {}
        absmax: dict[str, Tensor] = {}
        rounded: dict[str, Rounded] = {}
        for name, roles in model.stored.items():
            full = model.family.module(index, name)
            for end, values in ((SCALE, column), (ABSMAX, absmax)):
                if full + end in found:
                    values |= dict.fromkeys(roles, found[full + end])
            if full + WEIGHT in found:
                weights, scales = (model.split(name, found[full + end]) for end in (WEIGHT, WEIGHT_SCALE))
                biases = model.split(name, found[full + BIAS]) if full + BIAS in found else {}
                rounded |= {role: Rounded(weights[role], scales[role], biases.get(role)) for role in roles}
        keys = found.get(model.family.module(index, KEY) + SCALE)
        cache = [found.get(model.family.module(index, part) + CACHE_SCALE) for part in CACHED]
        return PlannedLayer(Scales(column, absmax, keys=keys), rounded, _both(*cache))

    def head(self, model: Model) -> PlannedHead:
        """The output head by the plan, which says nothing of one in float. Raises UserError for a file that does not
        hold this model's head."""
        if not self.facts.scheme.head.quantized:
            return UNPLANNED
        path, name = self.folder / HEAD, model.family.lm_head
        found = _load(path, "the output head of a plan")
        check_head(model, found, str(path))
        weight = found.get(name + WEIGHT)
        rounded = None if weight is None else Rounded(weight, found[name + WEIGHT_SCALE])
        return PlannedHead(found.get(name + SCALE), rounded)


def _both(key: Tensor | None, value: Tensor | None) -> CacheScales | None:
    return None if key is None or value is None else (key, value)


def _load(path: Path, what: str) -> dict[str, Tensor]:
    """The tensors of a file. what: it holds. Raises UserError if it cannot be read."""
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise_refusal(error, path)
        raise UserError(f"{path}: cannot be read ({error})", expected=what, do=DO) from error


def read_plan(folder: str | Path) -> Plan:
    """The plan in a folder, whose files are as they were written. Raises UserError for another folder."""
    folder = Path(folder)
    manifest = load_manifest(folder)
    if manifest.step != STEP:
        raise UserError(
            f"{folder} was made by smoothquant {manifest.step}",
            expected="a plan",
            do="make one: smoothquant search MODEL --text FILE --out PLAN",
        )
    check_content(folder, manifest)
    facts = read(PlanFacts, read_object(folder / PLAN), str(folder / PLAN))
    return Plan(folder, facts, combined(manifest.contents))
