"""The act scales file: read by others, whole, and never somebody else's."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from act_scales.store import HELD, INPUT, MEAN_SQUARE, OUTPUT, ActScales, load_act_scales
from smoothquant.errors import ActScalesError, OutputError
from smoothquant.model import Model
from tests.models import open_llama

Q = "model.layers.0.self_attn.q_proj"
DOWN = "model.layers.1.mlp.down_proj"


def scales_of(model: Model, **metadata: str) -> ActScales:
    generator = torch.Generator().manual_seed(0)
    inputs = {name: torch.rand(columns, generator=generator) for name, (_, columns) in model.linears()}
    outputs = {name: torch.rand(rows, generator=generator) for name, (rows, _) in model.linears()}
    held = {name: torch.rand(1, generator=generator) for name in ("model.layers.0", "model.layers.1", "lm_head")}
    squares = {name: values.square() / 4 for name, values in inputs.items()}
    return ActScales(inputs, outputs, metadata, held, squares)


def same(found: ActScales, expected: ActScales) -> bool:
    mine, theirs = found.tensors(), expected.tensors()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)


@pytest.fixture
def scales(llama: Model) -> ActScales:
    return scales_of(llama, model_fingerprint=llama.checkpoint.fingerprint, text_source='é, "quoted"')


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a.safetensors"


def test_the_safetensors_package_reads_the_file(scales: ActScales, llama: Model, path: Path) -> None:
    scales.save(path)
    found = load_file(path)
    linears = {name + suffix for name, _ in llama.linears() for suffix in (INPUT, OUTPUT, MEAN_SQUARE)}
    assert found.keys() == linears | {name + HELD for name in ("model.layers.0", "model.layers.1", "lm_head")}
    assert all(
        torch.equal(found[key], values) and values.dtype == torch.float32 for key, values in scales.tensors().items()
    )
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        assert len(metadata.pop("sha256")) == 64
        assert metadata == scales.metadata
    assert sorted(path.parent.iterdir()) == [path]


def test_round_trip(scales: ActScales, path: Path) -> None:
    scales.save(path)
    found = load_act_scales(path)
    assert same(found, scales)
    assert found.metadata == scales.metadata
    assert found.fingerprint == scales.fingerprint


def test_the_same_content_gives_the_same_bytes(scales: ActScales, path: Path) -> None:
    scales.save(path)
    parts = (scales.input_absmax, scales.output_absmax, scales.metadata, scales.held_absmax, scales.input_mean_square)
    shuffled = ActScales(*(dict(reversed(part.items())) for part in parts))
    shuffled.save(path.with_name("b.safetensors"))
    assert path.read_bytes() == path.with_name("b.safetensors").read_bytes()


def test_the_fingerprint_is_of_names_and_values(scales: ActScales) -> None:
    changed = dict(scales.input_absmax)
    changed[Q] = changed[Q] * 1.0001
    quieter = {name: values / 2 for name, values in scales.input_mean_square.items()}
    renamed = {name.replace("layers.0", "layers.7"): values for name, values in scales.input_absmax.items()}
    reaching = {name: 2 * values for name, values in scales.held_absmax.items()}
    others = [replace(scales, input_absmax=inputs, input_mean_square={}) for inputs in (changed, renamed)]
    others += [replace(scales, held_absmax=reaching), replace(scales, input_mean_square=quieter), scales]
    assert len({other.fingerprint for other in others}) == 5
    assert replace(scales, metadata={}).fingerprint == scales.fingerprint


# -- the published form ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("legacy", [False, True])
def test_the_published_form_is_read(legacy: bool, scales: ActScales, llama: Model, tmp_path: Path) -> None:
    published = {name: values.half() for name, values in scales.input_absmax.items()} | {"lm_head": torch.ones(64)}
    torch.save(published, tmp_path / "llama.pt", _use_new_zipfile_serialization=not legacy)
    found = load_act_scales(tmp_path / "llama.pt").for_model(llama)
    assert found.input_absmax.keys() == scales.input_absmax.keys()
    assert all(torch.equal(found.input_absmax[name], published[name].float()) for name in found.input_absmax)
    assert found.output_absmax == {}


def test_the_published_form_is_written(scales: ActScales, tmp_path: Path) -> None:
    scales.save_pt(tmp_path / "llama.pt")
    found = torch.load(tmp_path / "llama.pt", weights_only=True)
    assert found.keys() == scales.input_absmax.keys()
    assert all(torch.equal(found[name], scales.input_absmax[name]) for name in found)
    assert same(load_act_scales(tmp_path / "llama.pt"), ActScales(scales.input_absmax))


class Attack:
    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_pickle_is_not_run(legacy: bool, tmp_path: Path) -> None:
    path, trace = tmp_path / "evil.pt", tmp_path / "trace"
    torch.save({Q: torch.ones(64), "x": Attack(trace)}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ActScalesError, match=r"evil\.pt: .* code, .*not run") as caught:
        load_act_scales(path)
    assert "\n" not in str(caught.value)
    assert not trace.exists()
    torch.load(path, weights_only=False)  # the attack is a real one
    assert trace.exists()


# -- files that are none ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ([torch.ones(3)], "holds a list"),
        ({Q: 3.0}, f"entry '{Q}' is a float"),
        ({3: torch.ones(3)}, "entry 3 is a Tensor"),
        ({Q: {"nested": torch.ones(3)}}, "is a dict"),
        ({Q: torch.ones(3, dtype=torch.int64)}, "q_proj.input_absmax is int64"),
        ({}, "no activation scales in it"),
        ({Q: torch.ones(3, 3)}, r"q_proj.input_absmax is float32 \[3, 3\]; expected a vector"),
        ({Q: torch.tensor([1.0, float("nan")])}, "q_proj.input_absmax holds NaN, Inf or negative"),
        ({Q: torch.tensor([1.0, float("inf")])}, "holds NaN, Inf or negative"),
        ({Q: torch.tensor([1.0, -1.0])}, "holds NaN, Inf or negative"),
    ],
)
def test_a_wrong_pt_is_one_line(content: object, fault: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(ActScalesError, match=rf"a\.pt: .*{fault}") as caught:
        load_act_scales(tmp_path / "a.pt")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        ({"model.norm.weight": torch.ones(3)}, r"tensor model.norm.weight; expected only act scales"),
        ({Q + INPUT: torch.ones(3, dtype=torch.float16)}, "is float16"),
        ({Q + INPUT: torch.ones(())}, r"is float32 \[\]"),
        ({Q + INPUT: torch.ones(3), Q + OUTPUT: torch.tensor([float("nan")])}, "q_proj.output_absmax holds NaN"),
        ({Q + OUTPUT: torch.ones(3)}, "no activation scales in it"),
        ({Q + INPUT: torch.ones(3), Q + MEAN_SQUARE: torch.ones(2)}, "q_proj.input_mean_square does not belong to"),
        ({Q + INPUT: torch.ones(3), Q + MEAN_SQUARE: torch.full((3,), 1.01)}, "at most the square of its maximum"),
        (
            {Q + INPUT: torch.ones(3), DOWN + INPUT: torch.ones(3), Q + MEAN_SQUARE: torch.ones(3)},
            "down_proj.input_mean_",
        ),
        ({Q + INPUT: torch.ones(3), Q + MEAN_SQUARE: torch.tensor([1, 1, -1.0])}, "holds NaN, Inf or negative"),
        ({}, "no activation scales in it"),
    ],
)
def test_a_wrong_safetensors_is_one_line(content: dict[str, torch.Tensor], fault: str, path: Path) -> None:
    save_file(content, path)
    with pytest.raises(ActScalesError, match=rf"a\.safetensors: .*{fault}"):
        load_act_scales(path)


@pytest.mark.parametrize("size", [0, 4, 50, -1])
def test_a_truncated_file_is_one_line(size: int, scales: ActScales, path: Path) -> None:
    scales.save(path)
    scales.save_pt(path.with_suffix(".pt"))
    for file in (path, path.with_suffix(".pt")):
        os.truncate(file, size if size >= 0 else file.stat().st_size // 2)
        with pytest.raises(ActScalesError, match=rf"{file.name}: (truncated or corrupt|corrupt)") as caught:
            load_act_scales(file)
        assert "\n" not in str(caught.value)


def test_garbage_is_one_line(path: Path) -> None:
    for file in (path, path.with_suffix(".pt")):
        file.write_bytes(struct.pack("<Q", 1 << 60) + b"garbage" * 99)
        with pytest.raises(ActScalesError, match=rf"{file.name}: .*corrupt"):
            load_act_scales(file)


def test_no_such_file_and_no_such_kind(tmp_path: Path) -> None:
    with pytest.raises(ActScalesError, match="no such file; expected act scales made by smoothquant calibrate"):
        load_act_scales(tmp_path / "a.safetensors")
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(ActScalesError, match=r"a\.json: unknown kind of file; expected .*\.safetensors or \.pt"):
        load_act_scales(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("version", "remedy"),
    [("1", "make the file again: smoothquant calibrate or scales import"), ("4", "update this tool")],
)
def test_another_format_is_refused(version: str, remedy: str, scales: ActScales, path: Path) -> None:
    ActScales(scales.input_absmax, metadata={"format_version": version}).save(path)
    with pytest.raises(ActScalesError, match=f"format version {version}; expected 2 or 3; {remedy}"):
        load_act_scales(path)


def test_format_2_is_read_and_has_no_mean_squares(scales: ActScales, llama: Model, path: Path) -> None:
    older = replace(scales, input_mean_square={}, metadata={**scales.metadata, "format_version": "2"})
    older.save(path)
    found = load_act_scales(path)
    assert same(found.for_model(llama), older)
    assert not found.input_mean_square
    assert found.fingerprint != scales.fingerprint
    assert found.stamped(llama).metadata["format_version"] == "3"


def test_a_changed_file_is_refused(scales: ActScales, path: Path) -> None:
    """Any bit of the values, and of what the file says of itself."""
    scales.save(path)
    whole = path.read_bytes()
    start = 8 + struct.unpack("<Q", whole[:8])[0]
    for place in (start, start + 5, len(whole) - 1, whole.index(b"quoted"), whole.index(b"sha256") + 12):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(ActScalesError, match=r"a\.safetensors: its content is not what was written.*copy it"):
            load_act_scales(path)
    path.write_bytes(whole)
    assert same(load_act_scales(path), scales)


def test_an_unwritable_place_is_one_line(scales: ActScales, tmp_path: Path) -> None:
    for write in (scales.save, scales.save_pt):
        with pytest.raises(OutputError, match="cannot write there"):
            write(tmp_path / "nowhere" / "a.safetensors")


# -- whose scales ----------------------------------------------------------------------------------------------------


def test_scales_of_this_model(scales: ActScales, llama: Model) -> None:
    assert same(scales.for_model(llama), scales)


def test_scales_of_another_model_are_refused(scales: ActScales, llama: Model, make_llama: Callable[..., Path]) -> None:
    other = open_llama(make_llama(seed=1))
    mine, theirs = other.checkpoint.fingerprint, llama.checkpoint.fingerprint
    with pytest.raises(
        ActScalesError, match=rf"of another model \(fingerprint {theirs}\); expected .*{mine}.*calibrate"
    ):
        scales.for_model(other)
    same_shapes = replace(scales, metadata={})  # no fingerprint: names and shapes decide
    assert same(same_shapes.for_model(other), same_shapes)


def test_lm_head_is_dropped(scales: ActScales, llama: Model) -> None:
    head = {"lm_head": torch.ones(64)}
    inputs, outputs = dict(scales.input_absmax) | head, dict(scales.output_absmax) | head
    squares = dict(scales.input_mean_square) | head
    with_head = replace(scales, input_absmax=inputs, output_absmax=outputs, input_mean_square=squares)
    assert same(with_head.for_model(llama), scales)


def test_names_and_shapes_must_fit(scales: ActScales, llama: Model) -> None:
    inputs, outputs = dict(scales.input_absmax), dict(scales.output_absmax)
    unknown = {"model.layers.9.mlp.up_proj": torch.ones(64)}
    for wrong, fault in (
        (
            ActScales({name: inputs[name] for name in inputs if name != DOWN}, outputs),
            f"no activation scales for {DOWN}",
        ),
        (ActScales(inputs | unknown), "layers.9.mlp.up_proj, which this model does not have"),
        (ActScales(inputs | {DOWN: torch.ones(64)}), rf"{DOWN} have shape \[64\]; expected \[128\]"),
        (ActScales(inputs, outputs | unknown), "layers.9.mlp.up_proj, which this model does not have"),
        (ActScales(inputs, outputs | {DOWN: torch.ones(128)}), f"{DOWN}.output_absmax has 128 channels; expected 64"),
        (replace(scales, held_absmax={"model.layers.1": torch.ones(1)}), r"lm_head\.held_absmax is missing"),
        (
            replace(scales, held_absmax={**scales.held_absmax, "model.layers.9": torch.ones(1)}),
            r"model\.layers\.9\.held_absmax is not part of this model; expected one for each of its layers",
        ),
    ):
        with pytest.raises(ActScalesError, match=fault):
            wrong.for_model(llama)
