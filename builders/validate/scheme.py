"""Read the smoothing and quantization of an engine from its folder, and rebuild its layers from them.

    smoothquant/manifest.json          the inputs: model, smoothing settings, quantization scheme
    smoothquant/smoothing.safetensors  the scales that were folded, and the ranges behind static scales

The layers are rebuilt from the recorded scales, not from the equation that gave them, so int8 weights and static input
scales are the engine's bit for bit. (The folded gain of a norm is gain / s, computed again. In 16 bits it is the
engine's; in float32 it may differ by one rounding, like any other float32 operation.)

Weights that a search has rounded come from its plan, whose fingerprint the manifest records.

An INT8 folder of another tool has neither file: `builders.validate.int8_folder`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import Tensor

from smoothquant.artifacts.manifest import Origin
from smoothquant.artifacts.ports import CACHED, KEY
from smoothquant.artifacts.record import as_json
from smoothquant.artifacts.smoothing_file import SmoothingFile, read_smoothing
from smoothquant.errors import UserError
from smoothquant.fold import Scales, SmoothedLayer, fold
from smoothquant.head import UNPLANNED, PlannedHead
from smoothquant.int8_layer import int8_layer
from smoothquant.int8_model import Int8Model
from smoothquant.layers import FloatLayer, W8A8Layer
from smoothquant.model import Model
from smoothquant.outputs import load_manifest
from smoothquant.plan import Plan
from smoothquant.scheme import Scheme
from smoothquant.settings import SmoothingSettings
from smoothquant.steps import Step, as_records, from_records, replay
from smoothquant.stream import quantize_layer


@dataclass(frozen=True)
class EngineScheme:
    """The smoothing and quantization of one engine.

    key: the identity; engines with the same key quantize alike and share one pass over the layers. scheme: the
    quantization scheme. smoothing: the recorded scales. settings: the smoothing settings, which say where the scales
    were folded. ranks: the number of ranks of tensor parallelism. steps: the steps between smoothing and storing.
    folder: the INT8 folder whose layers are run as they are stored; None where they are rebuilt.
    run_time: for each linear whose input the engine divides, and whose smoothing scale does not count it, the divisor.
    unexplained: why the smoothing of a folder is not known, in words; empty if it is known.
    plan: the plan that has rounded its weights, if one has.
    """

    key: str
    scheme: Scheme
    smoothing: SmoothingFile = field(default_factory=SmoothingFile)
    settings: SmoothingSettings = field(default_factory=SmoothingSettings)
    ranks: int = 1
    steps: tuple[Step, ...] = ()
    folder: Int8Model | None = None
    run_time: Mapping[str, Tensor] = field(default_factory=dict)
    unexplained: str = ""
    plan: Plan | None = None

    @property
    def smoothing_scale(self) -> Mapping[str, Tensor]:
        """The smoothing scale of each linear, float32 (in,)."""
        return self.smoothing.smoothing_scale

    @property
    def input_absmax(self) -> Mapping[str, Tensor]:
        """The maxima of |input| of each linear, float32 (in,)."""
        return self.smoothing.input_absmax

    def column(self, model: Model, index: int, role: str) -> Tensor | None:
        """The divisor of a linear's input, (in,); None if its input was not smoothed."""
        name = model.linear(index, role)
        folded, divided = self.smoothing_scale.get(name), self.run_time.get(name)
        return folded if divided is None else divided if folded is None else folded * divided

    def cache_scales(self, model: Model, index: int) -> tuple[Tensor, Tensor] | None:
        """The scales of the keys and of the values of a layer; None for a float cache."""
        if not self.scheme.kv_cache.quantized:
            return None
        key, value = (self.smoothing.cache_scale[model.family.module(index, part)] for part in CACHED)
        return key, value

    def head(self, model: Model) -> PlannedHead:
        """The output head: the recorded scale of its input, and its weight as the plan has rounded it."""
        if not (self.plan and self.scheme.head.quantized):
            return UNPLANNED
        return replace(self.plan.head(model), smoothing_scale=self.smoothing_scale.get(model.family.lm_head))

    def layer(self, model: Model, index: int, source: FloatLayer) -> SmoothedLayer:
        """One layer of the checkpoint: the recorded smoothing folded in, the recorded steps applied, and the weights
        that the plan has rounded."""
        names = {role: model.linear(index, role) for role in model.roles}
        scales = Scales(
            column={role: self.smoothing_scale[name] for role, name in names.items() if name in self.smoothing_scale},
            input_absmax={role: self.input_absmax[name] for role, name in names.items() if name in self.input_absmax},
            keys=self.smoothing_scale.get(model.family.module(index, KEY)),
        )
        smoothed = replay(self.steps, fold(model, index, source, self.settings, scales))
        return replace(smoothed, rounded=self.plan.layer(model, index).rounded) if self.plan else smoothed

    def runnable(self, smoothed: SmoothedLayer) -> W8A8Layer:
        """The quantized layer: the folder's own, or the one that quantizing gives. smoothed: by `layer`."""
        if self.folder:
            return int8_layer(self.folder, smoothed.index)
        return quantize_layer(smoothed, self.scheme).runnable(self.scheme.activations)


def read_scheme(folder: str | Path, plans: Sequence[Plan] = ()) -> EngineScheme:
    """The scheme of a finished export or engine folder. plans: among them that which it was made by, if it was.

    Raises UserError if the folder does not record its scheme, and if its plan is not given.
    """
    folder = Path(folder)
    origin = load_manifest(folder).origin
    if len(origin.schemes) > 1:
        raise UserError(
            f"{folder}: the export holds two graphs, per token and per tensor",
            expected="one graph",
            do=f"run smoothquant build onnxruntime {folder} --act per-token (or per-tensor) --out ENGINE, "
            "and validate ENGINE",
        )
    recorded, ranks = read_smoothing(folder), origin.trtllm.tp if origin.trtllm else 1
    steps = from_records(origin.steps)
    facts = [as_json(origin.scheme), as_json(origin.smoothing), ranks, as_records(steps), recorded.digest, origin.plan]
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
    plan = _plan_of(folder, origin, plans)
    return EngineScheme(key, origin.scheme, recorded, origin.smoothing, ranks, steps, plan=plan)


def _plan_of(folder: Path, origin: Origin, plans: Sequence[Plan]) -> Plan | None:
    """The plan whose weights a folder holds; None where it holds none. Raises UserError if it is not given."""
    if origin.plan is None or not origin.scheme.quantized:
        return None
    for plan in plans:
        if plan.fingerprint == origin.plan:
            return plan
    given = ", ".join(f"{plan.folder} (fingerprint {plan.fingerprint})" for plan in plans)
    raise UserError(
        f"{folder}: made by the plan with fingerprint {origin.plan}" + (f", not by {given}" if given else ""),
        expected="that plan, which holds the weights that its search has rounded",
        do="give it with --plan",
    )
