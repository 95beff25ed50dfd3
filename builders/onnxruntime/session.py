"""ONNX Runtime sessions with the settings that suit the machine.

Threads: one per physical core, since matrix products saturate a core's units; no spinning, which on shared cores
takes time from the thread that works. Weights are mapped from the external data file, not read.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy

from smoothquant.errors import MissingPackageError, UserError

MODEL = "model.onnx"
SETTINGS = {"session.intra_op.allow_spinning": "0"}


def require_onnxruntime() -> Any:
    """The onnxruntime package, or MissingPackageError."""
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingPackageError(
            "the package onnxruntime is not installed", do='pip install "smoothquant-toolchain[onnxruntime]"'
        ) from error
    return onnxruntime


def physical_cores() -> int:
    """Cores that this process may use; two hardware threads of one core count once."""
    allowed = os.sched_getaffinity(0)
    siblings = {
        path.read_text().strip()
        for core in allowed
        if (path := Path(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list")).exists()
    }
    return len(siblings) or len(allowed)


def open_session(
    folder: Path, *, providers: Sequence[str] | None = None, threads: int | None = None, profile: Path | None = None
) -> Any:
    """An InferenceSession on `folder/model.onnx`. Raises UserError if the runtime refuses the graph or a provider."""
    onnxruntime = require_onnxruntime()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or physical_cores()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3  # errors only
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
        return onnxruntime.InferenceSession(str(folder / MODEL), options, providers=chosen)
    except Exception as error:  # onnxruntime raises bare exceptions of many kinds
        raise UserError(
            f"{folder / MODEL}: ONNX Runtime refuses it ({str(error).splitlines()[0]})",
            expected="a graph made by smoothquant export onnx",
            do="make the export again",
        ) from error


def operators_run(folder: Path, feed: Mapping[str, numpy.ndarray]) -> tuple[Counter[str], list[numpy.ndarray]]:
    """Run a graph once. Returns how often each operator ran, after fusion, and the outputs."""
    with tempfile.TemporaryDirectory() as scratch:
        session = open_session(folder, profile=Path(scratch) / "profile")
        outputs = session.run(None, dict(feed))
        events = json.loads(Path(session.end_profiling()).read_text())
    return Counter(event["args"]["op_name"] for event in events if event["name"].endswith("_kernel_time")), outputs
