"""All of it: from a float checkpoint to validated engines, in one folder, resumable.

    OUT/plan/, plan.html                 search, for outputs by a plan, and what it tried; or
    OUT/act_scales.safetensors           calibrate
    OUT/onnx/, OUT/w8a8/, OUT/trtllm/    one pass over the layers writes all that the targets need
    OUT/engine/TARGET/                   build
    OUT/validation.json, report.html     every engine against one pass of the float model

Every stage leaves its output whole or not at all, with the inputs that made it; a finished stage with unchanged
inputs is not done again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from act_scales.collect import collect
from act_scales.search import Wanted, search
from act_scales.store import load_act_scales
from act_scales.text import Text
from builders.validate import Thresholds, Validation, validate_engines
from builders.validate.card import note_measured
from builders.validate.report import check_report, read_report, write_json, write_plan_page, write_report
from exporters.export import Source, Writer, export
from recipes.targets import Target
from smoothquant.device import choose_device, choose_dtype
from smoothquant.errors import UserError
from smoothquant.memory import UNLIMITED, Budget, for_calibration, for_export, for_validation
from smoothquant.model import Model
from smoothquant.outputs import check_content, load_manifest
from smoothquant.packages import require
from smoothquant.plan import Plan
from smoothquant.scheme import PER_TOKEN, Scheme
from smoothquant.settings import SmoothingSettings
from smoothquant.steps import DEFAULT, Step, as_records
from smoothquant.workroom import forget
from smoothquant.workspace import say_unchanged

Stage = Callable[[str], AbstractContextManager[Callable[[int, int], None]]]  # name -> progress of a stage

ACT_SCALES, PLAN, VALIDATION, REPORT = "act_scales.safetensors", "plan", "validation.json", "report.html"


@dataclass(frozen=True)
class Output:
    """One engine or checkpoint to make.

    label: its name in tables, and in OUT/engine. scheme: what is INT8. form: the name of its folder where a target has
    several outputs. keep_float: linears to leave in float where activations are static, as in `static.linears_to_keep`.
    thresholds: what validation must reach; None for an output that is not validated. steps: between smoothing and
    storing. searched: what a search is to find for it, with the same settings and scheme; None without a search. The
    output head and the embedding are then the plan's, where the target may have them in INT8.
    """

    label: str
    target: Target
    settings: SmoothingSettings
    scheme: Scheme = PER_TOKEN
    form: str = ""
    keep_float: str = "auto"
    thresholds: Thresholds | None = Thresholds()  # noqa: RUF009 (frozen)
    steps: tuple[Step, ...] = DEFAULT
    searched: Wanted | None = None

    def check(self, model: Model) -> None:
        """Raise UserError or MissingPackageError for what cannot be made or validated here."""
        self.target.check(model, self.scheme)
        self.target.writer(Path(), model, self.scheme).smoothing.check(self.settings, model)
        as_records(self.steps)  # which refuses a step that validation could not do again
        for package in self.target.readers if self.thresholds else ():
            require(package, package=package.replace("_", "-"))

    def export(self, out: Path) -> Path:
        """The folder of its export."""
        return out / self.target.export / self.form

    def engine(self, out: Path) -> Path:
        """The folder of its engine, if it has one of its own."""
        return out / "engine" / (self.form or self.target.name)

    def writer(self, out: Path, source: Source) -> Writer:
        """The writer of its export."""
        scheme = self.scheme
        if source.plan:
            kept, planned = source.plan.float_linears, source.plan.facts.scheme
            scheme = replace(scheme, head=planned.head) if self.target.head else scheme
            scheme = replace(scheme, embedding=planned.embedding) if self.target.embedding else scheme
        else:
            kept = source.kept(self.keep_float) if scheme.activations.static else ()
        return self.target.writer(self.export(out), source.model, replace(scheme, float_linears=kept))


@dataclass(frozen=True)
class RecipeRun:
    """What `run` does. text: to calibrate on; heldout: to validate on; out: the folder for everything; memory: the
    bytes that calibration, export and the float model of validation may each take (`smoothquant.memory`); None for a
    layer."""

    model: Model
    text: Text
    heldout: Text
    out: Path
    outputs: tuple[Output, ...]
    memory: int | None = None

    def checked_budget(self) -> Budget:
        """The budget of the exports. Raises UserError for a search, whose memory has no bound, and for too little for
        any step."""
        model, memory = self.model, self.memory
        if memory is None:
            return UNLIMITED
        if any(output.searched for output in self.outputs):
            raise UserError(
                "--memory with a search, which holds a layer and the second moments of its inputs",
                expected="--no-search, or --alpha",
                do="drop --memory, or search first: smoothquant search --hessian-memory",
            )
        compute = choose_dtype("auto", model.checkpoint.dtype, choose_device())
        for_calibration(model, memory, max(map(len, self.text.sequences)), compute)
        engines = sum(output.thresholds is not None for output in self.outputs)
        for_validation(model, memory, max(map(len, self.heldout.sequences)), engines)
        return for_export(model, memory)


@dataclass(frozen=True)
class Made:
    """What `run` made. folders: what runs, by label; validations: of those that have thresholds; plans: of searches;
    act_scales: the files of ranges."""

    folders: Mapping[str, Path]
    validations: list[Validation]
    plans: tuple[Plan, ...]
    act_scales: tuple[Path, ...]


def source_of(
    model: Model, act_scales: str | Path | None, settings: SmoothingSettings, steps: tuple[Step, ...] = DEFAULT
) -> Source:
    """What an export starts from: the model, and its act scales checked against it."""
    fingerprints = {"model": model.checkpoint.fingerprint}
    if act_scales is None:
        return Source(model, settings, None, fingerprints, steps=steps)
    scales = load_act_scales(act_scales).for_model(model)
    fingerprints |= {"act_scales": scales.fingerprint}
    return Source(
        model,
        settings,
        scales.input_absmax,
        fingerprints,
        scales.output_absmax,
        steps,
        scales.held_absmax,
        scales.input_mean_square,
    )


def source_by_plan(model: Model, plan: Plan, steps: tuple[Step, ...] = DEFAULT) -> Source:
    """What an export by a plan starts from: scales, ranges and rounded weights are the plan's. plan: of this model."""
    return replace(source_of(model, plan.act_scales, plan.facts.smoothing, steps), plan=plan)


def write_page_of(plan: Plan, model: Model, path: str | Path) -> None:
    """Write the page that shows what the search for a plan has tried. plan: of this model."""
    write_plan_page(path, plan, model, load_act_scales(plan.act_scales).for_model(model).input_absmax)


def page_beside(folder: Path) -> Path:
    """The place of a plan's page: beside its folder."""
    return folder.with_name(f"{folder.name}.html")


def split_text(text: Text, heldout: int) -> tuple[Text, Text]:
    """Calibration and held-out text from one: the last `heldout` sequences are not calibrated on."""
    if len(text.sequences) < 2:
        raise UserError(
            f"{text.source}: {text.tokens} tokens are too few to calibrate on one part and validate on another",
            expected="at least two sequences of --length tokens",
            do="give more text, or a held-out text with --heldout",
        )
    heldout = min(heldout, len(text.sequences) // 2)
    return (
        replace(text, sequences=text.sequences[:-heldout]),
        replace(text, sequences=text.sequences[-heldout:]),
    )


def run(job: RecipeRun, stage: Stage, *, overwrite: bool = False) -> Made:
    """Search or calibrate, export, build, validate. Raises UserError before any work for what cannot be made here, else
    at the first stage that fails."""
    budget = job.checked_budget()
    out, searches = job.out, check_run(job)
    plans = _plans(job, searches, stage, overwrite)
    scales = [plan.act_scales for plan in plans.values()]
    if not all(output.searched for output in job.outputs):
        with stage("calibrate") as progress:
            collect(
                job.model,
                job.text,
                out / ACT_SCALES,
                overwrite=overwrite,
                memory=job.memory,
                progress=progress,
            )
        scales.append(out / ACT_SCALES)
    with stage("smooth, quantize, export") as progress:
        for unbounded, outputs in _passes(job, plans):
            source = replace(unbounded, budget=budget)
            writers = {output.export(out): output.writer(out, source) for output in outputs}
            export(source, list(writers.values()), overwrite=overwrite, progress=progress)
    folders: dict[str, Path] = {}
    with stage("build engines") as progress:
        for output in job.outputs:
            folders[output.label] = output.target.finish(output.export(out), output.engine(out), overwrite)
            progress(len(folders), len(job.outputs))
    thresholds = {output.label: output.thresholds for output in job.outputs if output.thresholds is not None}
    with stage("validate") as progress:
        engines = {label: folders[label] for label in thresholds}
        found = validated(
            engines,
            job.model,
            job.heldout,
            thresholds,
            out,
            progress,
            plans=tuple(plans.values()),
            overwrite=overwrite,
            memory=job.memory,
        )
    return Made(folders, found, tuple(plans.values()), tuple(scales))


def check_run(job: RecipeRun) -> dict[Wanted, Path]:
    """The folders of the plans of all searches. Raises UserError for what cannot be made here."""
    for output in job.outputs:
        output.check(job.model)
    searches = _searches(job)
    for path in (job.out / VALIDATION, job.out / REPORT, *map(page_beside, searches.values())):
        check_report(path, "--out")
    return searches


def _searches(job: RecipeRun) -> dict[Wanted, Path]:
    """The folders of plans for all outputs by a search; those with the same wishes share one."""
    wanted = dict.fromkeys(output.searched for output in job.outputs if output.searched)
    return {one: job.out / (f"{PLAN}-{number}" if number > 1 else PLAN) for number, one in enumerate(wanted, start=1)}


def _plans(job: RecipeRun, searches: Mapping[Wanted, Path], stage: Stage, overwrite: bool) -> dict[Wanted, Plan]:
    """The plans of all outputs by a search, each with its page beside it."""
    found: dict[Wanted, Plan] = {}
    for wanted, folder in searches.items():
        with stage("search") as progress:
            found[wanted] = search(job.model, job.text, folder, wanted, overwrite=overwrite, progress=progress)
        write_page_of(found[wanted], job.model, page_beside(folder))
    return found


def _passes(job: RecipeRun, plans: Mapping[Wanted, Plan]) -> Iterator[tuple[Source, list[Output]]]:
    """Outputs with the same smoothing and steps share a pass over the layers; float ones start from no act scales."""
    together: dict[tuple[SmoothingSettings, tuple[Step, ...], bool, Wanted | None], list[Output]] = {}
    for output in job.outputs:
        shared = (output.settings, output.steps, output.scheme.quantized, output.searched)
        together.setdefault(shared, []).append(output)
    for (settings, steps, quantized, wanted), outputs in together.items():
        if wanted:
            yield source_by_plan(job.model, plans[wanted], steps), outputs
        else:
            yield source_of(job.model, job.out / ACT_SCALES if quantized else None, settings, steps), outputs


def validated(
    engines: Mapping[str, Path],
    model: Model,
    text: Text,
    thresholds: Mapping[str, Thresholds],
    out: Path,
    progress: Callable[[int, int], None],
    *,
    plans: Sequence[Plan] = (),
    exact: bool = False,
    overwrite: bool = False,
    memory: int | None = None,
) -> list[Validation]:
    """Validate engines; leave `validation.json` and `report.html` in `out`.

    What was found before for the same inputs is taken from there, unless `overwrite`. Raises UserError for an engine
    whose files are not what was written.
    """
    key = _fingerprint(
        [load_manifest(folder).contents for folder in engines.values()],
        model.checkpoint.fingerprint,
        text.fingerprint,
        {label: asdict(limits) for label, limits in thresholds.items()},
        exact,
        [field.name for field in fields(Validation)],
    )
    done = None if overwrite else read_report(out / VALIDATION, key)
    if done:
        for folder in engines.values():
            check_content(folder, load_manifest(folder))
        say_unchanged(out / VALIDATION)
        write_report(out / REPORT, done)
        forget(out / VALIDATION)  # it may have died before it did
        return done
    found = validate_engines(
        engines,
        model,
        text,
        thresholds,
        plans=plans,
        exact=exact,
        work=out / VALIDATION,
        memory=memory,
        progress=progress,
    )
    for validation in found:
        note_measured(engines[validation.label], validation)
    write_report(out / REPORT, found)
    write_json(out / VALIDATION, found, inputs=key)
    forget(out / VALIDATION)
    return found


def _fingerprint(*inputs: object) -> str:
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]
