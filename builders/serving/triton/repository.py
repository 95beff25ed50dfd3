"""Put an engine folder into a Triton repository as a model.

    DIR/NAME/config.pbtxt        `builders.serving.triton.config`
    DIR/NAME/1/model.plan        or model.onnx and model.onnx.data: linked if the disk allows, or else copied
    DIR/NAME/smoothquant/manifest.json   the engine's inputs; Triton only reads folders whose names are numbers

NAME is the name of the engine folder. The tokenizer stays with the client, in the engine folder.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from builders.engine.exports import EXPORT, check_grown
from builders.onnx_graph import OnnxGraph
from builders.onnxruntime.record import CPU, OnnxRuntimeInputs
from builders.serving.triton import accelerator
from builders.serving.triton.config import SEQUENCES, DecoderModel, ModelTensor, config
from builders.tensorrt.record import STEP as TENSORRT
from builders.tensorrt.record import TensorRTInputs, TensorRTResults
from smoothquant.artifacts.manifest import Manifest
from smoothquant.artifacts.ports import MODEL
from smoothquant.digests import combined
from smoothquant.errors import OutputError, UserError
from smoothquant.files import check_place, write_text
from smoothquant.outputs import MANIFEST, check_apart, check_content, check_replaceable, load_manifest
from smoothquant.workspace import Workspace

STEP = "triton"
POOL, REQUESTS = 8 * 2**30, 2**26  # bytes: the most for caches by default, and Triton's own default, for requests
CONFIG, VERSION = "config.pbtxt", "1"
ELEMENTS = {1: "float32", 10: "float16", 16: "bfloat16", 3: "int8", 7: "int64"}  # ONNX's codes
BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int8": 1}
PROTOCOL = (
    "The server keeps the KV cache of every sequence. A request has input_ids [1, n]; position_ids [1, n], the numbers",
    "of these tokens from 0; attention_mask [1, 1 + tokens so far], ones after a single 0, which hides the first",
    "position of the cache; a sequence_id, and sequence_start or sequence_end if it is a sequence's first or last.",
)


def model_name(engine: str | Path) -> str:
    """The name that Triton serves an engine folder under."""
    return re.sub(r"[^A-Za-z0-9_.-]", "_", Path(engine).resolve().name)


def check_repository(engine: str | Path, repository: str | Path) -> None:
    """Raise OutputError where `write_model` could not write. engine: its folder, which need not be there yet."""
    out = Path(repository) / model_name(engine)
    if out.resolve() == Path(engine).resolve():
        raise OutputError(f"--triton {repository}: the model would be the engine's own folder", do="choose another")
    check_apart(out, {"the engine": engine}, "--triton")
    if out.exists():
        check_replaceable(out)
    check_place(out / MANIFEST, "--triton", repository)


def check_cache(folder: str | Path) -> None:
    """Raise UserError for a cache that is written in place. folder: an export or an engine. A state of Triton could be
    one buffer of a fixed size (use_same_buffer_for_input_output), but nobody has tried that."""
    manifest = load_manifest(folder)
    if manifest.step in (EXPORT, *DECODERS):
        check_grown(Path(folder), manifest.origin, "this tool's configuration of Triton")


def write_model(engine: str | Path, repository: str | Path, *, overwrite: bool = False) -> Path:
    """Put an engine into a model repository. Returns the model's folder.

    Raises UserError if Triton's backends do not run such an engine, OutputError if another model has its name.
    """
    engine, out = Path(engine), Path(repository) / model_name(engine)
    manifest = load_manifest(engine)
    check_content(engine, manifest)
    if manifest.step not in DECODERS:
        raise UserError(
            f"{engine}: made by {manifest.step!r}, which Triton's backends do not run",
            expected=f"made by {' or '.join(DECODERS)}",
        )
    check_cache(engine)
    describe, names = DECODERS[manifest.step]
    text = config(describe(engine, manifest))
    contents = manifest.contents
    content = combined({name: contents[name] for name in names})
    inputs = {"engine": manifest.inputs, "content": content, "config": text}
    with Workspace(out, STEP, inputs, overwrite=overwrite) as work:
        if not work.finished:
            for name in names:
                work.adopt(engine / name, f"{VERSION}/{name}")
            write_text(work.path(CONFIG), text)
            work.commit()
    return out


def _tensorrt(engine: Path, manifest: Manifest) -> DecoderModel:
    made, results = manifest.inputs_as(TensorRTInputs), manifest.results_as(TensorRTResults)
    built = made.tensorrt
    inputs, outputs = (_tensors(results, inputs=wanted) for wanted in (True, False))
    notes = [
        *PROTOCOL,
        f"Built by TensorRT {built.version} on {built.gpu}: needs the Triton release with this TensorRT.",
        f"A prompt goes in requests of at most {made.limits.chunk} tokens, the short one first.",
        f"Start it with  tritonserver {' '.join(_options(inputs, made))}",
        f"The pool holds the caches of {_held(inputs, made)} sequences at their longest, "
        f"{_state_bytes(inputs, made.limits.length)} bytes each; caches beyond it go through host memory.",
    ]
    return DecoderModel("tensorrt", inputs, outputs, gpu=True, profiles=2, notes=notes)


def _onnxruntime(engine: Path, manifest: Manifest) -> DecoderModel:
    graph = OnnxGraph(engine)

    def tensors(values: object) -> list[ModelTensor]:
        found = []
        for value in values:  # type: ignore[attr-defined]
            kind = value.type.tensor_type
            shape = tuple(-1 if dim.dim_param else dim.dim_value for dim in kind.shape.dim)
            found.append(ModelTensor(value.name, ELEMENTS[kind.elem_type], shape))
        return found

    inputs, outputs = tensors(graph.inputs), tensors(graph.proto.graph.output)
    made = manifest.inputs_as(OnnxRuntimeInputs)
    told = accelerator.parameters(engine, model_name(engine), graph, manifest)
    notes = [*PROTOCOL]
    if told:
        notes.append(
            f"TensorRT compiles the model at its first request and keeps it in {told['trt_engine_cache_path']}; "
            "a folder mounted there outlives the container."
        )
    on_cpu = made.provider == CPU
    return DecoderModel(
        "onnxruntime",
        inputs,
        outputs,
        gpu=not on_cpu,
        accelerator=("tensorrt", told) if told else None,
        parameters={"intra_op_thread_count": str(made.threads)} if on_cpu else {},
        notes=notes,
    )


def server_options(engine: str | Path) -> list[str]:
    """The options that tritonserver needs for an engine. Most engines need none."""
    manifest = load_manifest(engine)
    if manifest.step != TENSORRT:
        return []
    return _options(_tensors(manifest.results_as(TensorRTResults), inputs=True), manifest.inputs_as(TensorRTInputs))


def _options(inputs: list[ModelTensor], made: TensorRTInputs) -> list[str]:
    pool = _held(inputs, made) * _state_bytes(inputs, made.limits.length) + REQUESTS
    compatible = ["--backend-config=tensorrt,version-compatible=true"] if made.options.version_compatible else []
    return [f"--cuda-memory-pool-byte-size=0:{pool}", *compatible]


def _held(inputs: list[ModelTensor], made: TensorRTInputs) -> int:
    """How many sequences' caches the pool holds: all that take turns, or as many as `POOL` has room for, but one."""
    return max(1, min(SEQUENCES, POOL // _state_bytes(inputs, made.limits.length)))


def _tensors(results: TensorRTResults, *, inputs: bool) -> list[ModelTensor]:
    return [ModelTensor(port.name, port.dtype, port.shape) for port in results.ports if port.input == inputs]


def _state_bytes(inputs: list[ModelTensor], length: int) -> int:
    """The bytes of the state of one sequence at its longest. Triton holds the cache that a run reads and the one that
    it writes."""
    states = [tensor for tensor in inputs if tensor.dtype in BYTES and len(tensor.shape) == 4]
    return sum(2 * BYTES[dtype] * shape[1] * shape[3] * length for _, dtype, shape in states)


DECODERS: Mapping[str, tuple[Callable[[Path, Manifest], DecoderModel], tuple[str, ...]]] = {
    TENSORRT: (_tensorrt, ("model.plan",)),
    "build onnxruntime": (_onnxruntime, (MODEL, f"{MODEL}.data")),
}
