"""Build a TensorRT-LLM engine folder from a checkpoint folder, with NVIDIA's `trtllm-build`.

    rank0.engine, rank1.engine, ...    one for each GPU that serves; they run on the kind of GPU that built them
    config.json                        TensorRT-LLM's own description of the model and the build
    tokenizer files                    copies of the checkpoint's, for serving
    smoothquant/trtllm-build.log       everything that the tool printed
    smoothquant/manifest.json          the checkpoint's inputs and geometry (servers need the sliding window), limits,
                                       version, GPU, command

The checkpoint is checked first. An interruption ends the build with all its processes. The next build starts anew,
since the tool keeps no half-built engine.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.version import Version

from builders.tensorrt_llm.build.command import BuildLimits, build_command, container_command, doubts, options
from builders.tensorrt_llm.build.environment import Environment, find_environment
from builders.tensorrt_llm.build.process import run_logged
from builders.tensorrt_llm.format.check import check
from builders.tensorrt_llm.format.checkpoint import load_config, rank_file
from builders.tensorrt_llm.format.config import CheckpointConfig
from builders.tensorrt_llm.format.findings import CONFIG, errors
from builders.tensorrt_llm.format.releases import is_listed
from smoothquant.artifacts.manifest import Manifest, Origin
from smoothquant.artifacts.record import as_json
from smoothquant.digests import combined, sha256
from smoothquant.errors import CheckpointError, UserError
from smoothquant.files import remove_file
from smoothquant.outputs import OURS, check_content, is_output, load_manifest
from smoothquant.sidecars import SIDECARS, copy_sidecars
from smoothquant.workspace import Workspace

STEP = "build tensorrt-llm"
LOG = f"{OURS}/trtllm-build.log"
Progress = Callable[[int, int], None]  # (done, total)
FAULT = re.compile(r"error|exception|assert|\[E\]|out of memory", re.IGNORECASE)


@dataclass(frozen=True)
class TrtllmInputs:
    """The inputs of an engine, for its manifest.

    export: the checkpoint's `Origin`, empty for one by another tool. content: digest of its files. options: of
    `trtllm-build`.
    tensorrt_llm: its version. gpu: the names of this machine's GPUs.
    """

    export: Mapping[str, Any]
    content: str
    limits: BuildLimits
    options: Mapping[str, str]
    tensorrt_llm: str
    gpu: tuple[str, ...]


@dataclass(frozen=True)
class TrtllmResults:
    """The facts about a finished build, for the engine's manifest."""

    command: tuple[str, ...]
    versions_of_build: Mapping[str, str]


@dataclass(frozen=True)
class PlannedBuild:
    """A planned build. asked: the limits that the user gave. limits: the same with every number known. warnings: the
    warnings about the checkpoint, and doubts about the limits."""

    checkpoint: Path
    out: Path
    config: CheckpointConfig
    asked: BuildLimits
    limits: BuildLimits
    warnings: tuple[str, ...]

    @property
    def command(self) -> list[str]:
        """The command that builds the engine."""
        return build_command(self.checkpoint, self.out, self.limits, self.config)


def plan(checkpoint: str | Path, out: str | Path, limits: BuildLimits) -> PlannedBuild:
    """The plan of a build, after a check of the checkpoint and the limits.

    Raises CheckpointError if the checkpoint has errors, with the first of them and their number; UserError if the
    limits contradict each other or the model.
    """
    checkpoint = Path(checkpoint)
    if is_output(checkpoint):
        check_content(checkpoint, load_manifest(checkpoint))
    found = check(checkpoint)
    wrong = errors(found)
    if wrong:
        raise CheckpointError(
            f"{checkpoint}: {wrong[0].sentence}" + (f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""),
            do=f"see smoothquant check {checkpoint}",
        )
    config = load_config(checkpoint)
    resolved = limits.resolved(config)
    warnings = (*(finding.sentence for finding in found), *doubts(resolved, config))
    return PlannedBuild(checkpoint, Path(out), config, limits, resolved, warnings)


def build(
    what: PlannedBuild,
    *,
    overwrite: bool = False,
    progress: Progress = lambda done, total: None,
    line: Callable[[str], None] = lambda words: None,
    note: Callable[[str], None] = lambda words: None,
) -> Manifest:
    """Build an engine folder. Returns its manifest.

    progress: called with (ranks built, all ranks). line: called with each line of the tool's log. note: called with
    each doubt about this machine.
    Raises MissingPackageError if the tool or a GPU is missing, UserError if the tool fails.
    """
    instead = container_command(what.checkpoint, what.out, what.asked)
    environment = find_environment(instead)
    made = load_manifest(what.checkpoint) if is_output(what.checkpoint) else None
    origin = made.origin if made else None
    for doubt in _doubts(environment, origin):
        note(doubt)
    gpus = tuple(sorted({name for name, _ in environment.gpus}))
    export = as_json(origin) if origin else {}
    chosen = options(what.config, what.limits)
    inputs = TrtllmInputs(export, _content(what.checkpoint), what.limits, chosen, environment.version, gpus)
    with Workspace(what.out, STEP, as_json(inputs), overwrite=overwrite) as work:
        if not work.finished:
            ranks = what.config.ranks
            work.require(sum(rank_file(what.checkpoint, rank).stat().st_size for rank in range(ranks)))
            for name in (*_engines(ranks), CONFIG, LOG):
                remove_file(work.path(name))
            try:
                _run(what, environment.tool, work, progress, line)
            finally:
                work.own()
            copy_sidecars(what.checkpoint, work)
            results = TrtllmResults(tuple(what.command), {"tensorrt_llm": environment.version})
            work.commit(as_json(results), geometry=made.geometry if made else None)
    return load_manifest(what.out)


def _doubts(environment: Environment, origin: Origin | None) -> Iterator[str]:
    """Yield doubts that do not stop a build. origin: the checkpoint's; None for a checkpoint by another tool."""
    exported_for = origin.trtllm.trtllm_version if origin and origin.trtllm else None
    if exported_for and Version(exported_for) != Version(environment.version):
        yield (
            f"the checkpoint was exported for TensorRT-LLM {exported_for}, and {environment.version} builds it: the "
            "files are the same for both, but an engine only runs in the version that built it"
        )
    for name, capability in environment.gpus:
        if not is_listed(capability):
            yield (
                f"{name} has compute capability {capability}: only later versions of TensorRT-LLM have SmoothQuant "
                "kernels for it, and we have not tried them"
            )


def _run(what: PlannedBuild, tool: Path, work: Workspace, progress: Progress, line: Callable[[str], None]) -> None:
    ranks, last = what.config.ranks, ""

    def heard(words: str) -> None:
        nonlocal last
        if words and (FAULT.search(words) or not FAULT.search(last)):
            last = words
        line(words)
        progress(len(list(work.folder.glob("rank*.engine"))), ranks)

    progress(0, ranks)
    command = build_command(what.checkpoint, work.folder, what.limits, what.config)
    status = run_logged([str(tool), *command[1:]], work.path(LOG), heard)
    missing = [name for name in (CONFIG, *_engines(ranks)) if not work.path(name).is_file()]
    if status or missing:
        how = f"failed with status {status}" if status else f"left no {missing[0]}"
        raise UserError(
            f"trtllm-build {how}: {last[:300]}", expected="an engine for every rank", do=f"see {work.path(LOG)}"
        )
    progress(ranks, ranks)


def _engines(ranks: int) -> list[str]:
    return [f"rank{rank}.engine" for rank in range(ranks)]


def _content(checkpoint: Path) -> str:
    """Identity of what is built: SHA-256 over all files that the engine comes from, 16 hex digits."""
    names = (CONFIG, *SIDECARS, *(path.name for path in checkpoint.glob("rank*.safetensors")))
    return combined({name: sha256(checkpoint / name) for name in names if (checkpoint / name).is_file()})
