"""A TensorRT-LLM engine folder out of a checkpoint folder, by NVIDIA's `trtllm-build`.

    rank0.engine, rank1.engine, ...    one for each GPU that serves; they run on the kind of GPU they were built on
    config.json                        TensorRT-LLM's own, of model and build
    tokenizer files                    those of the checkpoint, for serving
    smoothquant/trtllm-build.log       everything that the tool said
    smoothquant/manifest.json          the checkpoint's inputs, limits, version, GPU, command

The checkpoint is checked first. An interrupted build is ended with all its processes, and starts anew: the tool keeps
no half-built engine.
"""

from __future__ import annotations

import hashlib
import re
import shutil
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
from smoothquant.checkpoint import SIDECARS
from smoothquant.errors import CheckpointError, UserError
from smoothquant.workspace import OURS, Workspace, is_output, load_manifest, remove

STEP = "build tensorrt-llm"
LOG = f"{OURS}/trtllm-build.log"
Progress = Callable[[int, int], None]  # (done, total)
FAULT = re.compile(r"error|exception|assert|\[E\]|out of memory", re.IGNORECASE)


@dataclass(frozen=True)
class TrtllmInputs:
    """What an engine was built from, for its manifest.

    export: the checkpoint's `Origin`, or the digest of a "checkpoint" by another tool. options: of `trtllm-build`.
    tensorrt_llm: its version. gpu: the names of this machine's GPUs.
    """

    export: Mapping[str, Any]
    limits: BuildLimits
    options: Mapping[str, str]
    tensorrt_llm: str
    gpu: tuple[str, ...]


@dataclass(frozen=True)
class TrtllmResults:
    """How an engine was built, for its manifest."""

    command: tuple[str, ...]
    versions_of_build: Mapping[str, str]


@dataclass(frozen=True)
class Plan:
    """What would be built. asked: limits as they were given; warnings: what the check of the checkpoint found, and
    doubts about the limits."""

    checkpoint: Path
    out: Path
    config: CheckpointConfig
    asked: BuildLimits
    limits: BuildLimits
    warnings: tuple[str, ...]

    @property
    def command(self) -> list[str]:
        """What builds it."""
        return build_command(self.checkpoint, self.out, self.limits, self.config)


def plan(checkpoint: str | Path, out: str | Path, limits: BuildLimits) -> Plan:
    """Check a checkpoint and the limits. Raises CheckpointError for the first error in it, and how many there are."""
    checkpoint = Path(checkpoint)
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
    return Plan(checkpoint, Path(out), config, limits, resolved, warnings)


def build(
    what: Plan,
    *,
    overwrite: bool = False,
    progress: Progress = lambda done, total: None,
    line: Callable[[str], None] = lambda words: None,
    note: Callable[[str], None] = lambda words: None,
) -> Manifest:
    """Build an engine folder. Returns its manifest. progress: (ranks built, ranks); line: gets the tool's log; note:
    what to know of this machine.

    Raises MissingPackageError where the tool or a GPU is missing, UserError if the tool fails.
    """
    instead = container_command(what.checkpoint, what.out, what.asked)
    environment = find_environment(instead)
    origin = load_manifest(what.checkpoint).origin if is_output(what.checkpoint) else None
    for doubt in _doubts(environment, origin):
        note(doubt)
    gpus = tuple(sorted({name for name, _ in environment.gpus}))
    export = as_json(origin) if origin else {"checkpoint": _digest(what.checkpoint)}
    inputs = TrtllmInputs(export, what.limits, options(what.config), environment.version, gpus)
    with Workspace(what.out, STEP, as_json(inputs), overwrite=overwrite) as work:
        if not work.finished:
            ranks = what.config.ranks
            work.require(sum(rank_file(what.checkpoint, rank).stat().st_size for rank in range(ranks)))
            for left in (*work.folder.glob("*.engine"), work.path(CONFIG), work.path(LOG)):
                remove(left)
            _run(what, environment.tool, work, progress, line)
            _copy_tokenizer(what.checkpoint, work.folder)
            work.commit(as_json(TrtllmResults(tuple(what.command), {"tensorrt_llm": environment.version})))
    return load_manifest(what.out)


def _doubts(environment: Environment, origin: Origin | None) -> Iterator[str]:
    """What is no reason to stop. origin: of the checkpoint, None for one by another tool."""
    exported_for = origin.trtllm.trtllm_version if origin and origin.trtllm else None
    if exported_for and Version(exported_for) != Version(environment.version):
        yield (
            f"exported for TensorRT-LLM {exported_for}, built by {environment.version}: the files are the same for "
            "both, but an engine runs in the version that built it"
        )
    for name, capability in environment.gpus:
        if not is_listed(capability):
            yield (
                f"{name}, compute capability {capability}: only later versions of TensorRT-LLM give it SmoothQuant "
                "kernels, and nobody here has tried them"
            )


def _run(what: Plan, tool: Path, work: Workspace, progress: Progress, line: Callable[[str], None]) -> None:
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


def _digest(checkpoint: Path) -> str:
    """A fingerprint of what the files of another tool's checkpoint look like."""
    digest = hashlib.sha256((checkpoint / CONFIG).read_bytes())
    for path in sorted(checkpoint.glob("rank*.safetensors")):
        digest.update(f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}".encode())
    return digest.hexdigest()[:16]


def _copy_tokenizer(checkpoint: Path, folder: Path) -> None:
    """What the checkpoint carries for serving."""
    for name in SIDECARS:
        if (checkpoint / name).is_file():
            shutil.copyfile(checkpoint / name, folder / name)
