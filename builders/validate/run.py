"""Run engines over a text and compare them with the reference.

    for each engine:  open -> forget it
    the reference:    every layer, once
    for each block of sequences, for each engine:  open -> logits of both for each sequence -> metrics

Engines are opened before because the reference may take hours: what cannot run here is to be told at once. No engine
lies in memory beside the reference's layers, or beside another engine. The reference's logits of a block are computed
once for all engines, and held until the last of them has met them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from builders.engine.generation import GeneratingEngine
from builders.engine.protocol import FOREIGN, Engine
from builders.engine.table import engine_manifest, open_engine
from builders.validate.candidate import Candidate, check_model
from builders.validate.reference import HeldOutText, Reference, check_text
from builders.validate.scheme import EngineScheme, read_scheme
from builders.validate.thresholds import Thresholds
from builders.validate.validation import Validation
from smoothquant.artifacts.manifest import Manifest
from smoothquant.device import choose_device
from smoothquant.errors import OutputError, UserError, raise_refusal
from smoothquant.model import Model
from smoothquant.scheme import scheme_of
from smoothquant.sweep import KEEP_EVERY, Progress
from smoothquant.workspace import Workspace, save_tensors, versions

HELD = 2 << 30  # bytes of the reference's logits in memory at a time, where several engines want them
COMPARED = "compared.safetensors"  # in the workspace: what the engines have shown so far
# of an engine that does not say how it was smoothed: none of its layers can be rebuilt
UNKNOWN = EngineScheme("", scheme_of("float"))


def validate_engines(
    folders: Mapping[str, str | Path],
    model: Model,
    text: HeldOutText,
    thresholds: Mapping[str, Thresholds] | None = None,
    *,
    exact: bool = False,
    device: str = "auto",
    work: str | Path | None = None,
    progress: Progress = lambda done, total: None,
) -> list[Validation]:
    """Validate engine folders, one open at a time, against one reference pass.

    folders: label -> engine or export folder. thresholds: by label; an engine without is only measured.
    exact: measure exactness too (a float64 pass; asked for by itself where a threshold needs it).
    device: where the reference is computed ("auto", "cpu", "cuda", "cuda:N"); engines choose their own.
    work: the folder WORK.partial keeps what an interrupted validation has found, and the same call goes on from there;
        it stays until `workspace.forget(work)`. Without one, an interrupted validation begins again.
    progress: called with (done, total), where one is a layer of the reference or a sequence of an engine.

    Raises UserError before any work is done: a folder that is no engine, an engine of another model, of another
    machine, or for shorter sequences; MissingPackageError if what would run an engine is not here. An engine by another
    tool does not say how it was smoothed: it has no exactness, and no errors of its linears.
    """
    thresholds, device = thresholds or {}, choose_device(device)
    exact = exact or any(limits.exactness_ratio is not None for limits in thresholds.values())
    manifests = {label: engine_manifest(folder) for label, folder in folders.items()}
    schemes = {}
    for label, folder in folders.items():
        check_model(manifests[label], model, str(folder))
        schemes[label] = UNKNOWN if manifests[label].step == FOREIGN else read_scheme(folder)
        if schemes[label] is UNKNOWN and thresholds.get(label, Thresholds()).exactness_ratio is not None:
            raise UserError(
                f"{folder}: no exactness_ratio can be measured, because its smoothing is not recorded",
                do="drop the threshold on exactness_ratio",
            )
    check_text(model, text)
    inputs = {
        "model": model.checkpoint.fingerprint,
        **model.choices,
        "text": text.fingerprint,
        "engines": [_identity(folders[label], manifest) for label, manifest in manifests.items()],
        "exact": exact,
        "device": device,
        "versions": versions(),
    }
    layers, total = model.geometry.layers, model.geometry.layers + len(folders) * len(text.sequences)
    progress(0, total)
    for folder in folders.values():
        _try(folder, text)
    with ExitStack() as stack:
        kept = stack.enter_context(Workspace(work, "validate", inputs, overwrite=True)) if work else None
        reference = Reference(
            model,
            text,
            list(schemes.values()),
            exact=exact,
            device=device,
            work=kept,
            progress=lambda done, _: progress(done, total),
        )
        candidates = [
            Candidate(label, manifests[label], schemes[label], thresholds.get(label, Thresholds()), reference)
            for label in folders
        ]
        _compare(candidates, list(folders.values()), reference, kept, lambda done: progress(layers + done, total))
    return [candidate.result() for candidate in candidates]


def validate(
    engine: Engine,
    reference: Reference,
    scheme: EngineScheme,
    thresholds: Thresholds = Thresholds(),  # noqa: B008 (frozen)
    *,
    label: str = "engine",
) -> Validation:
    """Compare one engine with a reference that was run with its scheme.

    Raises UserError for an engine of another model or vocabulary and for a threshold on what was not measured,
    ThresholdError for logits that are not finite. Missed thresholds are in the result, not raised.
    """
    candidate = Candidate(label, engine.manifest, scheme, thresholds, reference)
    for sequence in range(len(reference.text.sequences)):
        candidate.add(engine, reference.logits(sequence))
    return candidate.result()


def _compare(
    candidates: Sequence[Candidate],
    folders: Sequence[str | Path],
    reference: Reference,
    work: Workspace | None,
    progress: Callable[[int], None],
) -> None:
    """Take every engine through all sequences that it has not met yet."""
    if work:
        _restore(candidates, work)
        progress(sum(candidate.compared for candidate in candidates))
    opened: tuple[Candidate, Engine] | None = None
    saved = time.monotonic()
    order = list(zip(candidates, folders, strict=True))
    for block in _blocks(reference, HELD if len(candidates) > 1 else 0):
        held: dict[int, Tensor] = {}
        for candidate, folder in order:
            for sequence in block[max(0, candidate.compared - block.start) :]:
                if opened is None or opened[0] is not candidate:
                    opened = None  # one is forgotten before the next
                    opened = (candidate, open_engine(folder))
                if sequence not in held:
                    held[sequence] = reference.logits(sequence)
                candidate.add(opened[1], held[sequence])
                progress(sum(candidate.compared for candidate in candidates))
                if work and time.monotonic() - saved > KEEP_EVERY:
                    _save(candidates, work)
                    saved = time.monotonic()
        order.reverse()  # the engine that is open goes first in the next block
    if work:
        _save(candidates, work)


def _blocks(reference: Reference, nbytes: int) -> Iterator[range]:
    """Consecutive sequences whose logits take no more than `nbytes`; one, where that is too little."""
    start, size = 0, 0
    for number, ids in enumerate(reference.text.sequences):
        more = 4 * len(ids) * reference.model.geometry.vocab_size
        if number > start and size + more > nbytes:
            yield range(start, number)
            start, size = number, 0
        size += more
    yield range(start, len(reference.text.sequences))


def _save(candidates: Sequence[Candidate], work: Workspace) -> None:
    state = {f"{n}.{name}": values for n, one in enumerate(candidates) for name, values in one.state().items()}
    save_tensors(work.path(COMPARED), state)


def _restore(candidates: Sequence[Candidate], work: Workspace) -> None:
    path = work.path(COMPARED)
    if not path.exists():
        return
    try:
        state = load_file(path)
        for n, candidate in enumerate(candidates):
            start = f"{n}."
            candidate.restore({key.removeprefix(start): state[key] for key in state if key.startswith(start)})
    except (SafetensorError, OSError, KeyError) as error:
        raise_refusal(error, path)
        raise OutputError(
            f"{path}: truncated or corrupt ({error})",
            expected="what an interrupted run left",
            do=f"remove {work.folder} and start again",
        ) from error


def _try(folder: str | Path, text: HeldOutText) -> None:
    """Open an engine, to find out whether it can be."""
    engine = open_engine(folder)
    if isinstance(engine, GeneratingEngine):
        engine.check_length(max(map(len, text.sequences)))


def _identity(folder: str | Path, manifest: Manifest) -> dict:
    """What an engine is known by: if any of it has changed, what was found before is another engine's."""
    files = [Path(folder) / name for name in manifest.files]
    changed = {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in files}
    return {"folder": str(Path(folder).resolve()), "step": manifest.step, "made from": dict(manifest.inputs), **changed}
