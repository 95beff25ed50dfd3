"""Compare an engine's outputs with those of ONNX Runtime on the same graph, run by run and output by output.

    prefill    some tokens, with an empty cache
    decode     one more token; both read the cache that ONNX Runtime wrote in the prefill

Polygraphy feeds both, pairs their outputs and states for each output the smallest tolerances that would have passed.
Its own runner allocates every output anew and knows no second profile, so `EngineRunner` runs our engine. The feeds are
made here, since Polygraphy does not know decoders. Nothing is judged here: `smoothquant validate` says how far a W8A8
engine may be from the float model.

Differences have two causes. Float32 products round in another order, or in TF32. And now and then an activation falls
on the other side of a quantization boundary, which moves the output of its linear by a step.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy
import torch

from builders.onnxruntime.session import first_feed, open_session
from builders.tensorrt.engine import TensorRTEngine
from builders.tensorrt.limits import profile_of
from smoothquant.artifacts.ports import ATTENTION_MASK, INPUT_IDS, POSITION_IDS, PRESENT, WRITE_INDICES, past_of
from smoothquant.errors import UserError
from smoothquant.outputs import load_manifest
from smoothquant.packages import require

Feed = dict[str, numpy.ndarray]


@dataclass(frozen=True)
class Difference:
    """The difference between two outputs.

    run: "prefill" or "decode". output: its name. absolute, relative: the largest difference over all elements.
    typical: the median of the absolute differences.
    """

    run: str
    output: str
    absolute: float
    relative: float
    typical: float

    def as_dict(self) -> dict:
        """The fields as JSON values."""
        return asdict(self)


def compare(graph: str | Path, engine: TensorRTEngine, *, tokens: int = 32, seed: int = 0) -> list[Difference]:
    """The differences between an engine and ONNX Runtime, on random tokens.

    graph: the folder of the export that the engine was built from, or of an ONNX Runtime engine of it. tokens: the
    number of tokens, cut to the most that the engine takes at once.
    Raises UserError for a graph of another model or form, MissingPackageError without polygraphy.
    """
    graph = Path(graph)
    _check_same(graph, engine)
    tokens = min(tokens, engine.limits.chunk, engine.limits.length - 1)
    polygraphy = require("polygraphy.comparator", package="polygraphy")
    base = require("polygraphy.backend.base", package="polygraphy")
    backend = require("polygraphy.backend.onnxrt", package="polygraphy")
    quiet = require("polygraphy.logger", package="polygraphy").G_LOGGER
    session = open_session(graph)
    ids = torch.randint(0, engine.manifest.facts.vocab_size, (1, tokens + 1), generator=_seeded(seed)).numpy()
    feeds = list(_feeds(session, ids))
    runners = [backend.OnnxrtRunner(session, name="ONNX Runtime"), _runner(base, engine)]
    with quiet.verbosity(quiet.CRITICAL):
        ran = polygraphy.Comparator.run(runners, data_loader=feeds)
        check = _comparison(polygraphy)
        (_, expected), (_, found) = ran
        iterations = [check(*pair) for pair in zip(expected, found, strict=True)]
    return [
        Difference(run, output, float(one.max_absdiff), float(one.max_reldiff), float(one.median_absdiff))
        for run, outputs in zip(("prefill", "decode"), iterations, strict=True)
        for output, one in outputs.items()
    ]


def run_once(engine: TensorRTEngine, feed: Mapping[str, numpy.ndarray]) -> Feed:
    """All outputs of one run of an engine. feed: all of its inputs."""
    gpu, plan = engine.session.gpu, engine.session.plan
    (batch, tokens), tensors, shapes = feed[INPUT_IDS].shape, {}, {}
    with gpu.use():
        for name, port in sorted(plan.ports.items(), key=lambda named: not named[1].is_input):
            if port.is_input:
                tensor = torch.from_numpy(numpy.ascontiguousarray(feed[name])).to(gpu.device)
                shapes[name] = tuple(tensor.shape)
                tensors[name] = tensor if tensor.numel() else tensor.new_empty(1)  # an empty input has an address, too
            elif name.startswith(PRESENT) and engine.limits.capacity is not None:
                tensors[name] = tensors[past_of(name)]  # one memory
            else:
                shape: tuple[int, ...] = (batch, tokens, port.shape[-1])
                if name.startswith(PRESENT):
                    shape = (batch, port.shape[1], feed[ATTENTION_MASK].shape[1], port.shape[-1])
                tensors[name] = torch.empty(shape, dtype=port.dtype, device=gpu.device)
        plan.run(profile_of(tokens), shapes, {name: tensor.data_ptr() for name, tensor in tensors.items()})
    gpu.wait()
    return {name: tensors[name].cpu().numpy() for name, port in plan.ports.items() if not port.is_input}


def _check_same(graph: Path, engine: TensorRTEngine) -> None:
    origin, wanted = load_manifest(graph).origin, engine.manifest.origin
    found = origin.only(origin.scheme)  # the form in model.onnx
    if found != wanted:
        named = (field.name for field in fields(wanted))
        different = sorted(name for name in named if getattr(found, name) != getattr(wanted, name))
        raise UserError(
            f"{graph}: {engine.folder} was not built from it; they differ in {', '.join(different)}",
            expected="the export of this engine, or an ONNX Runtime engine of it",
            do="if the export holds both forms, run smoothquant build onnxruntime EXPORT --act FORM --out ENGINE",
        )


def _feeds(session: Any, ids: numpy.ndarray) -> Iterator[Feed]:
    prefill = first_feed(session, ids[:, :-1])
    yield prefill
    names = [value.name for value in session.get_outputs()]
    ran = dict(zip(names, session.run(names, prefill), strict=True))
    before = numpy.full((1, 1), ids.shape[1] - 1, dtype=numpy.int64)
    in_place = WRITE_INDICES in prefill
    yield {
        INPUT_IDS: ids[:, -1:],
        **({WRITE_INDICES: before[0]} if in_place else {ATTENTION_MASK: numpy.ones_like(ids), POSITION_IDS: before}),
        **{past_of(name): array for name, array in ran.items() if name.startswith(PRESENT)},
    }


def _comparison(polygraphy: Any) -> Any:
    """Polygraphy's function that compares two results. Version 0.53 renamed it, and 0.60 will drop the old name."""
    simple = getattr(polygraphy, "SimpleCompareFunc", None) or polygraphy.CompareFunc.simple
    return simple(check_error_stat="max", fail_fast=False)


def _runner(base: Any, engine: TensorRTEngine) -> Any:
    metadata = require("polygraphy.common", package="polygraphy").TensorMetadata

    class EngineRunner(base.BaseRunner):
        def get_input_metadata_impl(self) -> Any:
            found = metadata()
            for name, port in engine.session.plan.ports.items():
                if port.is_input:
                    found.add(name, port.dtype, [None if dim < 0 else dim for dim in port.shape])
            return found

        def infer_impl(self, feed_dict: Mapping[str, numpy.ndarray]) -> Feed:
            self.inference_time = 0.0
            return run_once(engine, feed_dict)

    return EngineRunner(name="TensorRT")


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
