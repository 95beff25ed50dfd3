"""Several formats in one pass: the bytes of as many exports, and the work of one."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor

from exporters.export import Source, Writer, export
from exporters.huggingface import SmoothedWriter, W8A8Writer
from exporters.trtllm import MODES, Ranks, TrtllmWriter
from smoothquant import stream
from smoothquant.checkpoint import Checkpoint
from smoothquant.data_file import DataFile
from smoothquant.errors import OutputError, UserError
from smoothquant.files import Piece
from smoothquant.memory import Budget
from smoothquant.outputs import check_content, load_manifest
from smoothquant.scheme import scheme_of
from tests.exporters.trtllm.checkpoints import makers
from tests.families.case import Case
from tests.plans import source_with_plan
from tests.writers import onnx_writer, w8a8_writer

TRTLLM: dict[str, Callable[[Path], list[TrtllmWriter]]] = {  # by layout
    "llama": lambda out: [TrtllmWriter(out, ranks=Ranks(pp=2))],
    "bloom": lambda out: [TrtllmWriter(out)],
    "falcon-40b": lambda out: [TrtllmWriter(out, ranks=Ranks(tp=2))],
    "opt": lambda out: [TrtllmWriter(out, MODES[2])],  # static: it has no other
    "mixtral": lambda out: [],  # none
    "phi3": lambda out: [TrtllmWriter(out)],
}
CHANGES = {"falcon-40b": {"activation": "gelu_pytorch_tanh"}}  # TensorRT-LLM's gelu is always that

AT_ONCE = 700  # numbers of a weight in memory: a few rows, which divide neither heads nor matrices


def writers(layout: str, out: Path) -> list[Writer]:
    """All formats that a layout has, each in its folder."""
    return [
        W8A8Writer(out / "w8a8"),
        onnx_writer(out / "onnx", "both", "fp16", lm_head="int8"),
        w8a8_writer(out / "static", "per-tensor"),
        SmoothedWriter(out / "hf"),
        *TRTLLM[layout](out / "trtllm"),
    ]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Source]:
    return makers(tmp_path_factory, {layout: CHANGES.get(layout, {}) for layout in TRTLLM})


@pytest.mark.parametrize("layout", TRTLLM)
def test_the_bytes_of_single_exports(layout: str, make: Callable[[str], Source], tmp_path: Path) -> None:
    """In one pass whole matrices are in memory, in the single ones a few rows: nothing that is written tells."""
    export(make(layout), writers(layout, tmp_path / "together"))
    for writer in writers(layout, tmp_path / "alone"):
        export(replace(make(layout), budget=Budget(AT_ONCE)), [writer])
    assert contents(tmp_path / "together") == contents(tmp_path / "alone")


@pytest.mark.parametrize("number", range(5))
def test_a_file_with_a_hole_gets_no_name(
    number: int, make: Callable[[str], Source], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A writer that forgets a tensor, by a fault of ours, leaves no output in any format."""
    written, count = DataFile.write, 0

    def forgetful(self: DataFile, pieces: Iterable[Piece], begin: int, end: int) -> None:
        nonlocal count
        count += 1
        if count == 9:
            list(pieces)
        else:
            written(self, pieces, begin, end)

    monkeypatch.setattr(DataFile, "write", forgetful)
    writer = writers("llama", tmp_path)[number]
    with pytest.raises(ValueError, match="a planned tensor was not written"):
        export(make("llama"), [writer])
    assert count > 9
    assert not writer.out.exists()


@pytest.mark.parametrize("layout", ["llama", "mixtral"])
def test_a_slice_is_read_twice(layout: str, make: Callable[[str], Source], tmp_path: Path) -> None:
    """Once for the scales, once for the rows, also of an expert that the contract's tokens do not reach."""
    source = make(layout)
    work = counted(replace(source, budget=Budget(AT_ONCE)), [W8A8Writer(tmp_path / "out")])
    for name, (rows, columns) in source.model.linears():
        assert work.reads[f"{name}.weight"] == 2 * -(-rows // (AT_ONCE // columns)) > 2


def test_the_bytes_by_a_plan(tmp_path: Path) -> None:
    """The plan has the head in INT8, which one of the two holds: each promises what its own head keeps."""
    scheme = scheme_of("per-token", head="int8")
    source = source_with_plan(Case("llama", tmp_path / "case"), scheme)

    def made(out: Path) -> list[Writer]:
        return [W8A8Writer(out / "w8a8"), onnx_writer(out / "onnx", lm_head="int8")]

    export(source, made(tmp_path / "together"))
    for writer in made(tmp_path / "alone"):
        export(source, [writer])
    assert contents(tmp_path / "together") == contents(tmp_path / "alone")


class Work(NamedTuple):
    """What a pass does. reads: how often each tensor is read; quantized: how often a matrix of each shape is."""

    reads: Counter[str]
    quantized: Counter[torch.Size]


def counted(source: Source, made: list[Writer]) -> Work:
    """Export, and count."""
    work = Work(Counter(), Counter())
    read, quantize = Checkpoint.read, stream.quantize_rows

    def reading(self: Checkpoint, name: str, rows: slice | None = None) -> Tensor:
        work.reads[name] += 1
        return read(self, name, rows)

    def quantizing(weight: Tensor, scale: Tensor) -> Tensor:
        work.quantized[weight.shape] += 1
        return quantize(weight, scale)

    with mock.patch.object(Checkpoint, "read", reading), mock.patch.object(stream, "quantize_rows", quantizing):
        export(source, made)
    return work


@pytest.mark.parametrize("layout", ["llama", "mixtral"])
def test_each_layer_is_read_and_quantized_once(layout: str, make: Callable[[str], Source], tmp_path: Path) -> None:
    source = make(layout)
    one = counted(source, [W8A8Writer(tmp_path / "one")])
    all_of_them = counted(source, writers(layout, tmp_path / "all"))
    assert all_of_them.quantized == one.quantized
    assert one.quantized.total() == sum(1 for _ in source.model.linears())
    layers = [name for name in one.reads if "layers." in name]
    assert len(layers) > 2 * len(source.model.stored)
    assert {all_of_them.reads[name] for name in layers} == {1}


def test_what_is_whole_stays_and_what_is_not_goes_on(
    make: Callable[[str], Source], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second format fails behind its last layer: the first is whole by then, and is not made again."""
    source, out = make("llama"), tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(type(writers("llama", out)[1]), "end", mock.Mock(side_effect=OSError(28, "no space")))
        with pytest.raises(OSError, match="no space"):
            export(source, writers("llama", out))
    assert {path.name for path in out.iterdir() if not path.name.endswith("-work")} == {"w8a8"}
    check_content(out / "w8a8", load_manifest(out / "w8a8"))
    before = {path: path.stat().st_mtime_ns for path in (out / "w8a8").rglob("*")}
    export(source, writers("llama", out))
    assert {path: path.stat().st_mtime_ns for path in (out / "w8a8").rglob("*")} == before
    export(source, writers("llama", tmp_path / "undisturbed"))
    assert contents(out) == contents(tmp_path / "undisturbed")


def test_what_one_format_cannot_hold_ends_the_command_before_the_pass(
    make: Callable[[str], Source], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="no experts"):
        export(make("mixtral"), [W8A8Writer(tmp_path / "w8a8"), TrtllmWriter(tmp_path / "trtllm")])
    assert not list(tmp_path.iterdir())


def test_the_disk_must_hold_all_of_them(make: Callable[[str], Source], tmp_path: Path) -> None:
    """Room for any one of them is too little."""
    source = make("llama")
    sizes = [writer.nbytes(source.model) for writer in writers("llama", tmp_path)]
    free = sum(sizes) + (64 << 20) - 1
    disk = mock.patch.object(shutil, "disk_usage", return_value=mock.Mock(free=free))
    with disk, pytest.raises(OutputError, match="free on this disk"):
        export(source, writers("llama", tmp_path))
    assert not [path for path in tmp_path.iterdir() if not path.name.endswith("-work")]
    for writer in writers("llama", tmp_path):
        with disk:
            export(source, [writer])
