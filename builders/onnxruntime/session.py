"""Open ONNX Runtime sessions with settings that suit the machine.

A session has one thread per physical core, since matrix products saturate a core's units. Threads do not spin, since
spinning takes time from the working thread on shared cores. Weights are mapped from the external data file, not read.
Subnormal numbers count as zero: exp of a masked score is subnormal and makes the softmax of a prompt eight times
slower. The session's own setting reaches the threads that it starts. The calling thread takes part in the work, so it
is set for the length of every run; by itself, the first session of a process would change that thread for good. x86
without VNNI multiplies u8 by u8, because its u8-by-s8 instruction saturates at 16 bits; with VNNI that would be four
times slower and is off. On a GPU the settings hold for the operators that stay on the CPU (`providers`).
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy

from builders.onnx_graph import OnnxGraph
from builders.onnxruntime.providers import (
    Provider,
    check_available,
    check_loaded,
    check_size,
    engine_cache,
    find_provider,
    is_large,
    provider_options,
    rtx_devices,
    rtx_options,
)
from builders.onnxruntime.record import CPU, GROUPED
from smoothquant.artifacts.manifest import Manifest, Origin
from smoothquant.artifacts.ports import ATTENTION_MASK, INPUT_IDS, LOGITS, MODEL, PAST, POSITION_IDS, WRITE_INDICES
from smoothquant.artifacts.record import as_json
from smoothquant.errors import UserError, raise_refusal
from smoothquant.files import scratch
from smoothquant.machine import cpu_flags, int8_flag, physical_cores, subnormals_as_zero
from smoothquant.outputs import load_manifest
from smoothquant.packages import require


def settings(flags: set[str]) -> dict[str, str]:
    """The session settings for a processor with these features (`smoothquant.machine.cpu_flags`)."""
    return {
        "session.intra_op.allow_spinning": "0",
        "session.set_denormal_as_zero": "1",
        **({"session.x64quantprecision": "1"} if int8_flag(flags) == "avx2" else {}),
    }


SETTINGS = settings(cpu_flags())
CACHES = {"tensor(float)": numpy.float32, "tensor(float16)": numpy.float16, "tensor(int8)": numpy.int8}


def check_body(folder: Path, origin: Origin) -> None:
    """Raise UserError if ONNX Runtime does not run the body's dtype. origin: the origin of the export."""
    if origin.onnx is not None and origin.onnx.body == "bf16":
        raise UserError(
            f"{folder}: ONNX Runtime lacks operators for a bfloat16 graph",
            expected="a body of fp32 or fp16",
            do="export with --dtype fp32 or fp16; bf16 is for TensorRT",
        )


def check_in_place(folder: Path, origin: Origin, provider: str, attention: str) -> None:
    """Raise UserError if a cache in place is to run elsewhere than on a processor, or with grouped attention.

    origin: the origin of the export. provider: a name of `providers.PROVIDERS`. attention: of `record.ATTENTION`.
    """
    if origin.onnx is None or origin.onnx.capacity is None:
        return
    for what, wrong in ((f"the provider {provider}", provider != CPU), ("grouped attention", attention == GROUPED)):
        if wrong:
            raise UserError(
                f"{folder}: a cache that is written in place, with {what}",
                expected=f"the provider {CPU} and standard attention, or TensorRT",
                do="export without --cache in-place, or use smoothquant build tensorrt",
            )


def open_session(
    folder: Path,
    *,
    provider: str = "cpu",
    threads: int | None = None,
    profile: Path | None = None,
    manifest: Manifest | None = None,
) -> Any:
    """An InferenceSession on `folder/model.onnx`.

    provider: a name of `providers.PROVIDERS`. manifest: the future manifest of a folder that is being made; by default
    the folder's manifest. Raises UserError if the runtime refuses the graph, MissingPackageError if it lacks the
    provider.
    """
    onnxruntime = require("onnxruntime")
    chosen = find_provider(provider)
    check_available(chosen)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or physical_cores()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 4  # raised errors say the same
    for key, value in SETTINGS.items():
        options.add_session_config_entry(key, value)
    if profile:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    try:
        with subnormals_as_zero():
            where = _where(chosen, options, folder, manifest)
            session = onnxruntime.InferenceSession(str(folder / MODEL), options, **where)
    except UserError:
        raise
    except Exception as error:  # onnxruntime raises bare exceptions of many kinds
        raise_refusal(error, folder)
        raise _refused(folder, error) from error
    check_loaded(chosen, session)
    return session


def _where(provider: Provider, options: Any, folder: Path, manifest: Manifest | None) -> dict:
    """The arguments that make a session use a provider. options: the session's options, which get the RTX plugin."""
    if provider.name in ("cpu", "cuda"):
        return {"providers": provider_options(provider.name, {}, half=False, large=False, longest=0, cache=folder)}
    path = folder / MODEL
    graph = OnnxGraph(path)
    inputs = graph.symbols
    manifest = load_manifest(folder) if manifest is None else manifest
    origin = manifest.origin
    source = as_json(replace(origin, schemes=()))  # an export may hold two schemes; the graph shows its own
    content = path.read_bytes() + json.dumps(source, sort_keys=True).encode()  # the weights are not in the graph
    cache = engine_cache(hashlib.sha256(content).hexdigest()[:16])
    longest = manifest.facts.max_positions
    if provider.name == "nv-tensorrt-rtx":
        options.add_provider_for_devices(rtx_devices(), rtx_options(inputs, longest=longest, cache=cache))
        return {}
    check_size(folder, graph.nbytes)
    half, large = origin.onnx is not None and origin.onnx.body == "fp16", is_large(graph.nbytes)
    chosen = provider_options(provider.name, inputs, half=half, large=large, longest=longest, cache=cache)
    return {"providers": chosen}


def first_feed(session: Any, ids: numpy.ndarray, mask: numpy.ndarray | None = None) -> dict[str, numpy.ndarray]:
    """The inputs of a run on whole sequences with an empty cache, by name.

    ids: int64 (batch, tokens). mask: (batch, tokens), 0 for padding on the left and 1 elsewhere; the default has no
    padding, and a cache that is written in place knows none.
    """
    mask = numpy.ones_like(ids) if mask is None else mask
    feed = {INPUT_IDS: ids}
    inputs = session.get_inputs()
    if any(value.name == WRITE_INDICES for value in inputs):
        feed[WRITE_INDICES] = numpy.zeros(len(ids), dtype=numpy.int64)
    else:
        feed |= {ATTENTION_MASK: mask, POSITION_IDS: numpy.maximum(mask.cumsum(axis=1) - 1, 0)}
    for value in inputs:
        if value.name.startswith(PAST):
            shape = (len(ids), value.shape[1], capacity_of(value) or 0, value.shape[3])
            feed[value.name] = numpy.zeros(shape, CACHES[value.type])
    return feed


def capacity_of(past: Any) -> int | None:
    """The tokens of a buffer that is written in place, None for a cache that grows. past: an input of a session."""
    return past.shape[2] if isinstance(past.shape[2], int) else None


def run_product(folder: Path, x: numpy.ndarray) -> numpy.ndarray:
    """The output of the graph in a folder that has one input, x, as `open_session` opens it on the CPU."""
    session = open_session(folder)
    [given] = session.get_inputs()
    return session.run(None, {given.name: x})[0]


def operators_run(
    folder: Path, ids: numpy.ndarray, provider: str = "cpu", manifest: Manifest | None = None
) -> tuple[Counter[str], numpy.ndarray]:
    """Run a graph once on ids (batch, tokens), as `open_session` opens it. Returns how often each operator ran, after
    fusion, and the logits."""
    with scratch() as place:
        session = open_session(folder, provider=provider, profile=place / "profile", manifest=manifest)
        try:
            with subnormals_as_zero():
                [logits] = session.run([LOGITS], first_feed(session, ids))
        except Exception as error:  # as above
            raise _refused(folder, error) from error
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    return Counter(event["args"]["op_name"] for event in events if event["name"].endswith("_kernel_time")), logits


def _refused(folder: Path, error: Exception) -> UserError:
    reason = str(error).partition("\n")[0]
    return UserError(
        f"{folder / MODEL}: ONNX Runtime refuses the graph ({reason})",
        expected="a graph made by smoothquant export onnx",
        do="make the export again",
    )
