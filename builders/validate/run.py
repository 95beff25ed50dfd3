"""Run engines over a text and compare them with the reference.

for each engine:  open -> forget it
the reference:    every layer, once
for each engine:  open -> for each sequence: logits of both -> metrics -> thresholds -> forget it

Engines are opened twice because the reference may take hours: what cannot run here is to be told before, and no engine
lies in memory beside the reference for nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from builders.engine import FOREIGN, SHAPE, Engine, engine_manifest, export_inputs, open_engine
from builders.engine.generation import GeneratingEngine
from builders.validate.metrics import Comparison, check_logits
from builders.validate.ranges import activation_ranges
from builders.validate.reference import Progress, Reference, Text, check_text
from builders.validate.scheme import Scheme, read_scheme
from builders.validate.thresholds import Thresholds
from builders.validate.validation import Exactness, Validation
from smoothquant.errors import UserError
from smoothquant.model import Model
from smoothquant.workspace import versions

# of an engine that does not say how it was smoothed: none of its layers can be rebuilt
UNKNOWN = Scheme("", "float", "float", smoothing_scale={}, input_absmax={})


def validate_engines(
    folders: Mapping[str, str | Path],
    model: Model,
    text: Text,
    thresholds: Mapping[str, Thresholds] | None = None,
    *,
    exact: bool = False,
    progress: Progress = lambda done, total: None,
) -> list[Validation]:
    """Validate engine folders, one open at a time, against one reference pass.

    folders: label -> engine or export folder. thresholds: by label; an engine without is only measured.
    exact: measure exactness too (a float64 pass; asked for by itself where a threshold needs it).
    progress: called with (done, total), where one is a layer of the reference or a sequence of an engine.

    Raises UserError before any work is done: a folder that is no engine, an engine of another model, of another
    machine, or for shorter sequences; MissingPackageError if what would run an engine is not here. An engine by another
    tool does not say how it was smoothed: it has no exactness, and no errors of its linears.
    """
    thresholds = thresholds or {}
    exact = exact or any(limits.exactness_ratio is not None for limits in thresholds.values())
    schemes = {}
    for label, folder in folders.items():
        manifest = engine_manifest(folder)
        check_model(manifest, model, str(folder))
        schemes[label] = UNKNOWN if manifest["step"] == FOREIGN else read_scheme(folder)
        if schemes[label] is UNKNOWN and thresholds.get(label, Thresholds()).exactness_ratio is not None:
            raise UserError(
                f"{folder}: no exactness_ratio can be measured, because its smoothing is not recorded",
                do="drop the threshold on exactness_ratio",
            )
    check_text(model, text)
    layers, sequences = model.geometry.layers, len(text.sequences)
    total = layers + len(folders) * sequences
    progress(0, total)
    for folder in folders.values():
        _try(folder, text)
    reference = Reference(
        model, text, list(schemes.values()), exact=exact, progress=lambda done, _: progress(done, total)
    )
    found = []
    for number, (label, folder) in enumerate(folders.items()):
        before = layers + number * sequences
        found.append(
            validate(
                open_engine(folder),
                reference,
                schemes[label],
                thresholds.get(label, Thresholds()),
                label=label,
                progress=lambda done, _, before=before: progress(before + done, total),  # type: ignore[misc]
            )
        )
    return found


def _try(folder: str | Path, text: Text) -> None:
    """Open an engine, to find out whether it can be."""
    engine = open_engine(folder)
    if isinstance(engine, GeneratingEngine):
        engine.check_length(max(map(len, text.sequences)))


def validate(
    engine: Engine,
    reference: Reference,
    scheme: Scheme,
    thresholds: Thresholds = Thresholds(),  # noqa: B008 (frozen)
    *,
    label: str = "engine",
    progress: Progress = lambda done, total: None,
) -> Validation:
    """Compare one engine with a reference that was run with its scheme. progress: (sequences done, sequences).

    Raises UserError for an engine of another model or vocabulary and for a threshold on what was not measured,
    ThresholdError for logits that are not finite. Missed thresholds are in the result, not raised.
    """
    check_model(engine.manifest, reference.model, label)
    if scheme.activations != "float" and scheme.key not in reference.streams:
        raise ValueError("the reference was run without this engine's scheme")
    stream = reference.streams.get(scheme.key)
    exact = stream is not None and torch.float64 in stream.hidden
    comparison, sequences = Comparison(reference.tokens), reference.text.sequences
    squares = torch.zeros(3, dtype=torch.float64)
    progress(0, len(sequences))
    for index, ids in enumerate(sequences):
        found = engine.logits(ids[None])
        check_logits(found, len(ids), reference.model.geometry.vocab_size, index)
        comparison.add(reference.logits(index), found[0], ids)
        if exact:
            true = reference.w8a8_logits(scheme, index, torch.float64)
            pytorch = reference.w8a8_logits(scheme, index, torch.float32)
            squares += torch.stack([part.double().square().sum() for part in (found[0] - true, pytorch - true, true)])
        progress(index + 1, len(sequences))
    metrics = comparison.metrics()
    engine_error, pytorch_error = (squares[:2] / squares[2].clamp_min(1e-300)).sqrt().tolist()
    exactness = Exactness(engine_error, pytorch_error) if exact else None
    measured = {name: getattr(metrics, name) for name in ("kl_mean", "kl_p99", "top1", "perplexity_ratio")}
    measured["relative_error"] = metrics.relative_error
    if exactness:
        measured["exactness_ratio"] = exactness.ratio
    ranges, channels = activation_ranges(reference, scheme)
    return Validation(
        label=label,
        subject=_subject(engine.manifest, reference),
        metrics=metrics,
        checks=thresholds.check(measured),
        exactness=exactness,
        linears=tuple(stream.linears) if stream else (),
        hidden_errors=tuple(stream.hidden_errors) if stream else (),
        ranges=ranges,
        channels=channels,
        samples=comparison.samples(),
    )


def check_model(manifest: Mapping, model: Model, name: str) -> None:
    """Raise UserError unless an engine was made from the reference's checkpoint; one by another tool, unless it has its
    shape. name: what errors call it."""
    inputs, geometry = export_inputs(manifest), model.geometry
    if manifest["step"] == FOREIGN:
        expected = (geometry.vocab_size, geometry.hidden_size, geometry.layers)
        for key, number in zip(SHAPE, expected, strict=True):
            if inputs[key] != number:
                raise UserError(
                    f"{name}: this checkpoint has {key} {inputs[key]}",
                    expected=f"{number}, the reference's",
                    do="give the model that it was converted from",
                )
    elif inputs.get("model") != model.checkpoint.fingerprint:
        raise UserError(
            f"{name}: this engine was made from model {inputs.get('model')}",
            expected=f"{model.checkpoint.fingerprint}, the reference",
            do="give the checkpoint that the engine was made from",
        )


def _subject(manifest: Mapping, reference: Reference) -> dict:
    inputs, text = export_inputs(manifest), reference.text
    return {
        "engine": manifest["step"],
        "bytes": sum(manifest.get("files", {}).values()),
        "inputs": dict(inputs),
        "engine_versions": manifest.get("versions", {}),
        "checkpoint": reference.model.checkpoint.folder.resolve().name,
        "model": reference.fingerprint,
        "stored": reference.name,
        "reference": reference.description,
        "text": text.source,
        "text_fingerprint": text.fingerprint,
        "sequences": len(text.sequences),
        "tokens": reference.tokens,
        "versions": versions(),
    }
