"""Run engines over a text and compare them with the reference.

    for each engine:  open it, then close it
    the reference:    run every layer once
    for each block of sequences, for each engine:  open it -> logits of both for each sequence -> metrics

Engines are opened first because the reference may take hours, and an engine that does not run here must be reported at
once. An engine is never in memory together with the reference's layers or another engine. The reference's logits of a
block are computed once for all engines, and held until the last engine has been compared with them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from builders.engine.generation import GeneratingEngine
from builders.engine.protocol import FOREIGN, Engine
from builders.engine.table import engine_manifest, open_engine
from builders.validate.candidate import Candidate, check_model
from builders.validate.int8_folder import is_int8_folder, open_int8_folder
from builders.validate.reference import HeldOutText, Reference, check_text
from builders.validate.scheme import EngineScheme, read_scheme
from builders.validate.thresholds import Thresholds
from builders.validate.validation import Validation
from smoothquant.artifacts.manifest import Manifest
from smoothquant.batches import sequences_in, shared_batches
from smoothquant.device import choose_device
from smoothquant.errors import UserError
from smoothquant.memory import for_validation
from smoothquant.model import Model
from smoothquant.outputs import check_content, versions
from smoothquant.plan import Plan
from smoothquant.scheme import IN_FLOAT
from smoothquant.sweep import Progress
from smoothquant.team import ALONE, Team
from smoothquant.workroom import Workroom

HELD = 2 << 30  # bytes of the reference's logits in memory at a time, if several engines need them
COMPARED = "compared"  # tensors in the workspace: the sums of all engines so far, of each rank
RANKS = "ranks"  # among them: how many these are
# the scheme of an engine whose smoothing is not recorded: its layers cannot be rebuilt
UNKNOWN = EngineScheme("", IN_FLOAT)


def validate_engines(
    folders: Mapping[str, str | Path],
    model: Model,
    text: HeldOutText,
    thresholds: Mapping[str, Thresholds] | None = None,
    *,
    plans: Sequence[Plan] = (),
    exact: bool = False,
    device: str = "auto",
    work: str | Path | None = None,
    memory: int | None = None,
    team: Team = ALONE,
    progress: Progress = lambda done, total: None,
) -> list[Validation]:
    """The validations of engine folders against one pass of the reference. One engine is open at a time.

    folders: the engine or export folders, by label. thresholds: the thresholds, by label; an engine without thresholds
        is only measured.
    plans: those of this model that engines were made by (`Plan.for_model`), and no others.
    exact: whether to measure exactness, too, which takes a float64 pass. A threshold on exactness implies it.
    device: the device of the reference ("auto", "cpu", "cuda", "cuda:N"). Engines choose their own devices.
    work: the folder WORK.smoothquant-work keeps the results of an interrupted validation, and the same call continues
        them. It stays until `workroom.forget(work)`. Without `work`, an interrupted validation begins again.
    memory: the bytes that the float model may take beside the engines (`smoothquant.memory`); None for a layer.
    team: the processes that share the sequences; all call this. What engines were compared on is known to as many.
    progress: called with (done, total), counted in layers of the reference and sequences of an engine.

    Raises UserError before any work if a folder is not an engine, if an engine is of another model, for another
    machine, or for shorter sequences, and if its plan is not given; MissingPackageError if the package that runs an
    engine is missing. An INT8 folder of another tool runs in our own W8A8 arithmetic; its smoothing is recovered from
    its weights. The smoothing of another tool's TensorRT-LLM checkpoint is not known: it has no exactness, and no
    errors of its linears.
    """
    thresholds, device = thresholds or {}, choose_device(device)
    exact = exact or any(limits.exactness_ratio is not None for limits in thresholds.values())
    manifests, schemes = {}, {}
    for label, folder in folders.items():
        manifests[label], schemes[label] = _read(folder, model, plans)
        check_model(manifests[label], model, str(folder))
        if schemes[label] is UNKNOWN and thresholds.get(label, Thresholds()).exactness_ratio is not None:
            raise UserError(
                f"{folder}: no exactness_ratio can be measured, because its smoothing is not recorded",
                do="drop the threshold on exactness_ratio",
            )
    _check_plans(plans, list(schemes.values()))
    check_text(model, text)
    budget = for_validation(model, memory, max(map(len, text.sequences)), len(folders))
    team.check_enough(len(text.sequences), text.source)
    inputs = {
        "model": model.checkpoint.fingerprint,
        **model.choices,
        "text": text.fingerprint,
        "engines": [_identity(folders[label], manifest) for label, manifest in manifests.items()],
        "exact": exact,
        "device": device.partition(":")[0],
        "versions": versions(),
    }
    team.agree(inputs)
    layers, mine = model.geometry.layers, sequences_in(shared_batches(text.sequences, team, budget), text.sequences)
    total = layers + len(folders) * len(mine)
    progress(0, total)
    for label, folder in folders.items():
        if schemes[label].folder is None:
            _try(folder, text)
    with ExitStack() as stack:
        kept = stack.enter_context(Workroom(work, "validate", inputs, team)) if work else None
        reference = Reference(
            model,
            text,
            list(schemes.values()),
            exact=exact,
            device=device,
            work=kept,
            budget=budget,
            team=team,
            progress=lambda done, _: progress(done, total),
        )
        candidates = [
            Candidate(label, manifests[label], schemes[label], thresholds.get(label, Thresholds()), reference)
            for label in folders
        ]
        _compare(candidates, list(folders.values()), reference, kept, lambda done: progress(layers + done, total))
        for candidate in candidates:
            candidate.merge()
    return [candidate.result() for candidate in candidates]


def validate(
    engine: Engine,
    reference: Reference,
    scheme: EngineScheme,
    thresholds: Thresholds = Thresholds(),  # noqa: B008 (frozen)
    *,
    label: str = "engine",
) -> Validation:
    """The validation of one engine against a reference that was run with its scheme.

    Raises UserError for an engine of another model or vocabulary and for a threshold on a measure that was not taken,
    ThresholdError for logits that are not finite. The result holds missed thresholds; they are not raised.
    """
    candidate = Candidate(label, engine.manifest, scheme, thresholds, reference)
    for sequence in reference.sequences:
        candidate.add(engine, reference.logits(sequence))
    candidate.merge()
    return candidate.result()


def _compare(
    candidates: Sequence[Candidate],
    folders: Sequence[str | Path],
    reference: Reference,
    work: Workroom | None,
    progress: Callable[[int], None],
) -> None:
    """Compare every engine on all sequences of this rank that it has not been compared on yet."""
    if work:
        _restore(candidates, work)
    done = sum(candidate.compared for candidate in candidates)
    progress(done)
    left = max(reference.team.gathered(len(candidates) * len(reference.sequences) - done))
    opened: tuple[Candidate, Engine | None] | None = None
    order = list(zip(candidates, folders, strict=True))
    for block in _blocks(reference, HELD if len(candidates) > 1 else 0):
        held: dict[int, Tensor] = {}
        for candidate, folder in order:
            for sequence in block[max(0, reference.sequences.start + candidate.compared - block.start) :]:
                if opened is None or opened[0] is not candidate:
                    opened = None  # an engine is closed before the next is opened
                    opened = (candidate, None if candidate.streamed else open_engine(folder))
                if sequence not in held:
                    held[sequence] = reference.logits(sequence)
                candidate.add(opened[1], held[sequence])
                done, left = done + 1, left - 1
                progress(done)
                if work and work.due:
                    _save(candidates, work)
        order.reverse()  # the engine that is open goes first in the next block
    if work:
        for _ in range(left):  # other ranks have more, and save with all
            if work.due:
                _save(candidates, work)
        _save(candidates, work)


def _blocks(reference: Reference, nbytes: int) -> Iterator[range]:
    """Yield blocks of consecutive sequences of this rank. The logits of a block take at most `nbytes`, unless one
    sequence takes more."""
    start, size = reference.sequences.start, 0
    for number in reference.sequences:
        more = 4 * len(reference.text.sequences[number]) * reference.model.geometry.vocab_size
        if number > start and size + more > nbytes:
            yield range(start, number)
            start, size = number, 0
        size += more
    yield range(start, reference.sequences.stop)


def _save(candidates: Sequence[Candidate], work: Workroom) -> None:
    mine = {f"{n}.{name}": values for n, one in enumerate(candidates) for name, values in one.state().items()}
    every = enumerate(work.team.gathered(mine))
    state = {f"{rank}.{name}": values for rank, theirs in every for name, values in theirs.items()}
    work.keep(COMPARED, {RANKS: torch.tensor([work.team.count]), **state})


def _restore(candidates: Sequence[Candidate], work: Workroom) -> None:
    state = work.team.same(work.state(COMPARED))
    known = state and state[RANKS].item() == work.team.count  # else sequences are shared in another way
    for n, candidate in enumerate(candidates) if known else ():
        start = f"{work.team.rank}.{n}."
        candidate.restore({key.removeprefix(start): state[key] for key in state if key.startswith(start)})


def _check_plans(plans: Sequence[Plan], schemes: Sequence[EngineScheme]) -> None:
    """Raise UserError for a plan that no engine was made by."""
    for plan in plans:
        if not any(scheme.plan is plan for scheme in schemes):
            raise UserError(
                f"{plan.folder}: no weights of these engines are from this plan",
                expected="the plan that an engine was made by",
                do="leave it away",
            )


def _read(folder: str | Path, model: Model, plans: Sequence[Plan]) -> tuple[Manifest, EngineScheme]:
    """The manifest and the scheme of an engine, whose files are as they were written."""
    if is_int8_folder(Path(folder)):
        return open_int8_folder(Path(folder), model, plans)
    manifest = engine_manifest(folder)
    check_content(folder, manifest)
    return manifest, UNKNOWN if manifest.step == FOREIGN else read_scheme(folder, plans)


def _try(folder: str | Path, text: HeldOutText) -> None:
    """Open an engine and close it, to find out whether it runs."""
    engine = open_engine(folder)
    if isinstance(engine, GeneratingEngine):
        engine.check_length(max(map(len, text.sequences)))


def _identity(folder: str | Path, manifest: Manifest) -> dict:
    """What an engine is known by: if any of it has changed, what was found before is another engine's."""
    return {
        "folder": str(Path(folder).resolve()),
        "step": manifest.step,
        "made from": dict(manifest.inputs),
        **manifest.contents,
    }
