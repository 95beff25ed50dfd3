"""ONNX Runtime sessions with the settings that suit the machine.

Threads: one per physical core, since matrix products saturate a core's units; no spinning, which on shared cores
takes time from the thread that works. Weights are mapped from the external data file, not read. Subnormal numbers
count as zero: exp of a masked score is subnormal, and makes the softmax of a prompt eight times slower. x86 without
VNNI multiplies u8 by u8, because its u8-by-s8 instruction saturates at 16 bits; with VNNI that costs 4x and is off.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy
import torch

from smoothquant.errors import UserError
from smoothquant.machine import cpu_flags, physical_cores
from smoothquant.packages import require


def settings(flags: set[str]) -> dict[str, str]:
    """Session settings for a processor with these features (`smoothquant.machine.cpu_flags`)."""
    saturates = "avx2" in flags and not flags & {"avx512_vnni", "avx_vnni"}
    return {
        "session.intra_op.allow_spinning": "0",
        "session.set_denormal_as_zero": "1",
        **({"session.x64quantprecision": "1"} if saturates else {}),
    }


MODEL = "model.onnx"
SETTINGS = settings(cpu_flags())
PAST, PRESENT = "past_key_values.", "present."


def open_session(
    folder: Path, *, providers: Sequence[str] | None = None, threads: int | None = None, profile: Path | None = None
) -> Any:
    """An InferenceSession on `folder/model.onnx`. Raises UserError if the runtime refuses the graph or a provider."""
    onnxruntime = require("onnxruntime")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or physical_cores()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 4  # an error is raised, and says the same
    for key, value in SETTINGS.items():
        options.add_session_config_entry(key, value)
    if profile:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    chosen = list(providers or ["CPUExecutionProvider"])
    unknown = set(chosen) - set(onnxruntime.get_available_providers())
    if unknown:
        raise UserError(
            f"ONNX Runtime here has no {', '.join(sorted(unknown))}",
            expected=f"of {', '.join(onnxruntime.get_available_providers())}",
            do="install the package that has it (onnxruntime-gpu for CUDA)",
        )
    try:
        with subnormals_as_zero():
            return onnxruntime.InferenceSession(str(folder / MODEL), options, providers=chosen)
    except Exception as error:  # onnxruntime raises bare exceptions of many kinds
        raise _refused(folder, error) from error


@contextmanager
def subnormals_as_zero() -> Iterator[None]:
    """Subnormal numbers count as zero in this thread, and only inside.

    The session's own setting reaches the threads that it starts. The thread that calls it takes part in its work; of
    all sessions of a process the first would set that thread, too, and for whatever it computes ever after.
    """
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def first_feed(session: Any, ids: numpy.ndarray, mask: numpy.ndarray | None = None) -> dict[str, numpy.ndarray]:
    """Inputs for whole sequences and an empty cache.

    ids: (batch, tokens) int64; mask: the same shape, 0 for padding on the left, 1 elsewhere (the default).
    """
    mask = numpy.ones_like(ids) if mask is None else mask
    feed = {"input_ids": ids, "attention_mask": mask, "position_ids": numpy.maximum(mask.cumsum(axis=1) - 1, 0)}
    for value in session.get_inputs():
        if value.name.startswith(PAST):
            dtype = numpy.float16 if "float16" in value.type else numpy.float32
            feed[value.name] = numpy.zeros((len(ids), value.shape[1], 0, value.shape[3]), dtype)
    return feed


def operators_run(folder: Path, ids: numpy.ndarray) -> tuple[Counter[str], numpy.ndarray]:
    """Run a graph once on ids (batch, tokens). Returns how often each operator ran, after fusion, and the logits."""
    with tempfile.TemporaryDirectory() as scratch:
        session = open_session(folder, profile=Path(scratch) / "profile")
        try:
            with subnormals_as_zero():
                [logits] = session.run(["logits"], first_feed(session, ids))
        except Exception as error:  # as above
            raise _refused(folder, error) from error
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    return Counter(event["args"]["op_name"] for event in events if event["name"].endswith("_kernel_time")), logits


def _refused(folder: Path, error: Exception) -> UserError:
    reason = str(error).partition("\n")[0]
    return UserError(
        f"{folder / MODEL}: ONNX Runtime refuses it ({reason})",
        expected="a graph made by smoothquant export onnx",
        do="make the export again",
    )
