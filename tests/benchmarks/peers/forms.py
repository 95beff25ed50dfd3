"""Every engine by its name, and how its folder is made of a model."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy
from tokenizers import Tokenizer, models
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from builders import openvino
from builders.onnxruntime import build
from builders.onnxruntime.record import GROUPED
from builders.openvino import graph
from exporters.export import Source, export
from smoothquant.artifacts.ports import ATTENTION_MASK, INPUT_IDS, LOGITS_TO_KEEP, MODEL, POSITION_IDS
from smoothquant.machine import cpu_flags
from tests.benchmarks.peers.llama_cpp import write_q8_0
from tests.servers.environments import VLLM
from tests.servers.quantizers import ENVIRONMENT  # without our path: genai's builder has a package builders, too
from tests.writers import onnx_writer, w8a8_writer

BASE = "ONNX Runtime, FP32"
OURS = ("ours", "ours, INT8 head", "ours in OpenVINO", "ours in OpenVINO, INT8 head")


@dataclass(frozen=True)
class Forms:
    """A model, and what is made of it. place: where; source: what exports start from; calibration: sequences of tokens
    for tools that calibrate, each (tokens,) int64; random ones if there are none."""

    model: Path
    place: Path
    source: Source
    calibration: Sequence[Tensor] = ()

    @cached_property
    def exports(self) -> dict[str, Path]:
        """Our exports by the form of their head; "FP32" and "W8A8" (the folder that vLLM reads), too."""
        made = {name: self.place / f"export-{name}" for name in ("FP32", "float", "int8", "W8A8")}
        writers = [
            onnx_writer(made["FP32"], activations="float"),
            *(onnx_writer(made[head], lm_head=head) for head in ("float", "int8")),
            w8a8_writer(made["W8A8"]),
        ]
        export(self.source, writers)
        return made

    def folder(self, name: str) -> Path:
        return self.place / name.replace(" ", "-").replace(",", "")


def exported(forms: Forms, out: Path, which: str) -> Path:
    return forms.exports[which]


def grouped(forms: Forms, out: Path, head: str) -> Path:
    build(forms.exports[head], out, attention=GROUPED)
    return out


def in_openvino(forms: Forms, out: Path, which: str) -> Path:
    openvino.build(forms.exports[which], out)
    return out


def dynamic(forms: Forms, out: Path) -> Path:
    """A float graph by ONNX Runtime's own tool: INT8 per column, activations per tensor while it runs."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    out.mkdir()
    options: dict[str, Any] = {"weight_type": QuantType.QInt8, "per_channel": True}
    where = {"op_types_to_quantize": ["MatMul"], "use_external_data_format": True}
    quantize_dynamic(forms.exports["FP32"] / MODEL, out / MODEL, **options, **where)
    (out / "config.json").write_bytes((forms.model / "config.json").read_bytes())
    return out


def by_genai(forms: Forms, out: Path, precision: str) -> Path:
    """By onnxruntime-genai's own builder, which wants a tokenizer."""
    source = forms.model
    if not (source / "tokenizer.json").exists():
        words = {f"<{number}>": number for number in range(forms.source.model.geometry.vocab_size)}
        PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, "<0>"))).save_pretrained(source)
    command = ["-m", "onnxruntime_genai.models.builder", "-e", "cpu", "-p", precision]
    places = ["-i", source, "-o", out, "-c", forms.place / "cache"]
    packages = ENVIRONMENT | {"PYTHONPATH": ":".join(path for path in sys.path if path.endswith("peers-packages"))}
    found = subprocess.run(
        [sys.executable, *command, *map(str, places)], capture_output=True, text=True, cwd=forms.place, env=packages
    )
    if found.returncode:
        raise RuntimeError(found.stderr[-300:])
    return out


def by_nncf(forms: Forms, out: Path) -> Path:
    """Our float graph by NNCF: INT8 with its SmoothQuant and static scales, from the calibration's tokens."""
    import nncf
    import openvino as runtime

    model = runtime.Core().read_model(forms.exports["FP32"] / MODEL)
    graph._open_logits_to_keep(model)
    random, words = numpy.random.default_rng(0), forms.source.model.geometry.vocab_size
    sequences = [one.numpy() for one in forms.calibration] or [random.integers(0, words, 128) for _ in range(8)]
    feeds = [_feed(model, sequence[None]) for sequence in sequences]
    kinds = {"model_type": nncf.ModelType.TRANSFORMER, "preset": nncf.QuantizationPreset.PERFORMANCE}
    quantized = nncf.quantize(model, nncf.Dataset(feeds), subset_size=len(feeds), **kinds)
    graph._keep_cache(quantized)
    out.mkdir()
    runtime.save_model(quantized, out / "openvino.xml", compress_to_fp16=False)
    (out / "config.json").write_bytes((forms.model / "config.json").read_bytes())
    return out


def _feed(model: Any, ids: numpy.ndarray) -> dict[str, numpy.ndarray]:
    """The inputs of a whole sequence with an empty cache."""
    given = {
        INPUT_IDS: ids,
        ATTENTION_MASK: numpy.ones_like(ids),
        POSITION_IDS: numpy.arange(ids.shape[1])[None],
        LOGITS_TO_KEEP: numpy.zeros(1, dtype=numpy.int64),
    }
    for port in model.inputs:
        if port.any_name not in given:
            shape = [part.get_length() if part.is_static else 0 for part in port.partial_shape]
            given[port.any_name] = numpy.zeros([1, *shape[1:]], dtype=numpy.float32)
    return given


def q8_0(forms: Forms, out: Path) -> Path:
    write_q8_0(forms.model, out)
    return out


def itself(forms: Forms, out: Path) -> Path:
    return forms.model


@dataclass(frozen=True)
class PeerForm:
    """An engine of the table.

    kind: of `worker.KINDS`, or vllm. body, head: how it computes the layers and the output head. make: its folder.
    packages: modules that it needs beside ours. flags: of which the processor must have one.
    """

    name: str
    kind: str
    body: str
    head: str
    make: Callable[[Forms, Path], Path]
    packages: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()

    @property
    def missing(self) -> str:
        """What it lacks here; "" if nothing."""
        if self.kind == "vllm":
            return "" if VLLM.python else "its environment (python -m tests.servers vllm)"
        if self.flags and not set(self.flags) & cpu_flags():
            return f"a processor with {' or '.join(self.flags)}"
        return ", ".join(package for package in self.packages if find_spec(package) is None)


ROUNDED = "INT8 per token"
BF16 = ("avx512_bf16", "amx_bf16")
PEERS = (
    PeerForm(BASE, "standard", "FP32", "FP32", partial(exported, which="FP32")),
    PeerForm("ours", "grouped", ROUNDED, "FP32", partial(grouped, head="float")),
    PeerForm("ours, INT8 head", "grouped", ROUNDED, "INT8", partial(grouped, head="int8")),
    PeerForm("ours in OpenVINO", "openvino", ROUNDED, "FP32", partial(in_openvino, which="float")),
    PeerForm("ours in OpenVINO, INT8 head", "openvino", ROUNDED, "INT8", partial(in_openvino, which="int8")),
    PeerForm("vLLM on our W8A8 folder", "vllm", f"{ROUNDED}, BF16 between", "BF16", partial(exported, which="W8A8")),
    PeerForm(
        "ONNX Runtime, quantize_dynamic",
        "standard",
        "INT8 per tensor",
        "INT8",
        dynamic,
    ),
    PeerForm("OpenVINO, FP32", "openvino", "FP32", "FP32", partial(in_openvino, which="FP32")),
    PeerForm("OpenVINO, BF16", "openvino-bf16", "BF16", "BF16", partial(in_openvino, which="FP32"), flags=BF16),
    PeerForm(
        "OpenVINO, NNCF INT8",
        "openvino",
        "INT8 per tensor, static",
        "INT8",
        by_nncf,
        ("nncf",),
    ),
    PeerForm("PyTorch, BF16", "torch-bf16", "BF16", "BF16", itself, flags=BF16),
    PeerForm("torchao, INT8 dynamic", "torchao", ROUNDED, "INT8", itself, ("torchao",)),
    PeerForm(
        "onnxruntime-genai, int8",
        "genai",
        "INT8 in blocks, activations too",
        "INT8",
        partial(by_genai, precision="int8"),
        ("onnx_ir",),
    ),
    PeerForm(
        "onnxruntime-genai, int4",
        "genai",
        "INT4 in blocks, activations INT8",
        "INT4",
        partial(by_genai, precision="int4"),
        ("onnx_ir",),
    ),
    PeerForm(
        "llama.cpp, Q8_0",
        "llama.cpp",
        "INT8 in blocks of 32, activations too",
        "Q8_0",
        q8_0,
        ("xllamacpp", "gguf"),
    ),
)


def chosen(names: Sequence[str] | None) -> list[PeerForm]:
    """The engines of those names, or all; what lacks something here is said and left out."""
    found = []
    for peer in PEERS:
        if names is None or peer.name in names or peer.name == BASE:
            if peer.missing:
                print(f"left out: {peer.name}: it needs {peer.missing}", file=sys.stderr)
            else:
                found.append(peer)
    return found


def missing() -> dict[str, str]:
    """What engines lack here, by their names."""
    return {peer.name: peer.missing for peer in PEERS if peer.missing}


def make_all(forms: Forms, peers: list[PeerForm]) -> tuple[dict[PeerForm, Path], dict[str, str]]:
    """The folder of each engine, and why others have none, by name."""
    folders, failed = {}, {}
    for peer in peers:
        try:
            folders[peer] = peer.make(forms, forms.folder(peer.name))
        except Exception as error:  # of any tool: the others are measured all the same
            if peer.name == BASE:
                raise
            failed[peer.name] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            print(f"left out: {peer.name}: {failed[peer.name]}", file=sys.stderr)
    return folders, failed
