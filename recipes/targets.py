"""What the pipeline makes of a model: one row per target. Packages are imported when a row is used.

    target          export     engine                            validated by
    w8a8            w8a8/      the checkpoint itself             transformers with compressed-tensors
    onnxruntime     onnx/      engine/onnxruntime/               ONNX Runtime
    openvino        onnx/      engine/openvino/                  OpenVINO
    tensorrt        onnx-tensorrt/  engine/tensorrt/             TensorRT, on the GPU of this machine; a half body
    tensorrt-llm    trtllm/    the checkpoint itself, checked    the interpreter of its format

NVIDIA's trtllm-build makes the engine of the last one, in its container: the pipeline ends with a checkpoint that the
loader takes and whose logits are measured.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from smoothquant.errors import CheckpointError
from smoothquant.packages import require
from smoothquant.scheme import Scheme

if TYPE_CHECKING:  # torch is imported when a command runs, not for --help
    from exporters.export import Writer
    from smoothquant.model import Model


@dataclass(frozen=True)
class Target:
    """One target.

    name: on the command line. export: the folder of its export.
    check: called with the model and the scheme, before any work; raises UserError for what the target cannot hold,
        MissingPackageError for a package or a GPU that is not here.
    writer: the export's, for the folder, the model and the scheme.
    finish: called with the folders of export and engine and with whether to overwrite; makes what runs, and returns
        its folder.
    readers: packages that validation needs beyond what `check` asks for. then: what to do with the folder elsewhere.
    head, embedding: whether its engines may have an output head, and an embedding, in INT8.
    """

    name: str
    export: str
    check: Callable[[Model, Scheme], None]
    writer: Callable[[Path, Model, Scheme], Writer]
    finish: Callable[[Path, Path, bool], Path]
    readers: tuple[str, ...] = ()
    then: str = ""
    head: bool = False
    embedding: bool = False


def _needs_a_server(model: Model, scheme: Scheme) -> None:
    from builders.readers import check_served, facts_of

    check_served(facts_of("compressed-tensors", scheme, model.checkpoint.config))


def _w8a8(out: Path, model: Model, scheme: Scheme) -> Writer:
    from exporters.huggingface import W8A8Writer

    return W8A8Writer(out, scheme)


def _as_it_is(export: Path, engine: Path, overwrite: bool) -> Path:
    return export


def _onnx(out: Path, model: Model, scheme: Scheme) -> Writer:
    from exporters.onnx import OnnxWriter

    return OnnxWriter(out, scheme)


def _half_onnx(out: Path, model: Model, scheme: Scheme) -> Writer:
    from exporters.onnx import OnnxWriter
    from exporters.onnx.form import body_for

    return OnnxWriter(out, scheme, body=body_for("tensorrt", model.checkpoint.dtype))


def _needs_onnxruntime(model: Model, scheme: Scheme) -> None:
    require("onnx")
    require("onnxruntime")


def _onnxruntime(export: Path, engine: Path, overwrite: bool) -> Path:
    from builders import onnxruntime

    onnxruntime.build(export, engine, overwrite=overwrite)
    return engine


def _needs_openvino(model: Model, scheme: Scheme) -> None:
    from builders.openvino.package import require_openvino

    require("onnx")
    require_openvino()


def _openvino(export: Path, engine: Path, overwrite: bool) -> Path:
    from builders import openvino

    openvino.build(export, engine, overwrite=overwrite)
    return engine


def _needs_tensorrt(model: Model, scheme: Scheme) -> None:
    from builders.tensorrt import hardware

    require("onnx")
    hardware.require_tensorrt()
    hardware.find_gpu()


def _tensorrt(export: Path, engine: Path, overwrite: bool) -> Path:
    from builders.tensorrt.build import build

    build(export, engine, overwrite=overwrite)
    return engine


def _needs_decoder(model: Model, scheme: Scheme) -> None:
    from exporters.trtllm import check_model, choose

    check_model(model, choose(scheme))


def _trtllm(out: Path, model: Model, scheme: Scheme) -> Writer:
    from exporters.trtllm import TrtllmWriter, choose, dtype_of

    mode = choose(replace(scheme, float_linears=()))  # the format leaves none in float
    return TrtllmWriter(out, mode, dtype=dtype_of(model, mode))


def _checked(export: Path, engine: Path, overwrite: bool) -> Path:
    from builders.tensorrt_llm import check
    from builders.tensorrt_llm.format.findings import errors

    for finding in errors(check(export)):
        raise CheckpointError(f"{export}: {finding.sentence}", do=f"see smoothquant check {export}")
    return export


def hold_embedding(targets: Collection[Target]) -> bool:
    """Whether one of these may have an embedding in INT8, and all that are built from the same export."""
    exports = {target.export for target in targets if target.embedding}
    return bool(exports) and all(target.embedding for target in targets if target.export in exports)


TARGETS: Mapping[str, Target] = {
    target.name: target
    for target in (
        Target("onnxruntime", "onnx", _needs_onnxruntime, _onnx, _onnxruntime, head=True, embedding=True),
        Target("openvino", "onnx", _needs_openvino, _onnx, _openvino, head=True, embedding=True),
        Target("tensorrt", "onnx-tensorrt", _needs_tensorrt, _half_onnx, _tensorrt, head=True),
        Target(
            "tensorrt-llm",
            "trtllm",
            _needs_decoder,
            _trtllm,
            _checked,
            then="smoothquant build tensorrt-llm {folder} --out ENGINE",
        ),
        Target("w8a8", "w8a8", _needs_a_server, _w8a8, _as_it_is, readers=("transformers", "compressed_tensors")),
    )
}
