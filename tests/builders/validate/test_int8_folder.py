"""INT8 folders that this tool did not make, against the reference: from the folder to which linears hurt."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from act_scales.text import Text
from builders.engine.protocol import ANYBODY
from builders.transformers import TransformersEngine
from builders.validate import Reference, Validation, read_scheme, validate_engines
from builders.validate.int8_folder import open_int8_folder
from builders.validate.report import write_report
from smoothquant.errors import UserError
from smoothquant.model import Model
from smoothquant.outputs import OURS
from tests import zoo
from tests.families.case import Case
from tests.int8_folders import edit_json, save_compressed_tensors, save_modelopt
from tests.models import open_llama, sample_ids

LAYOUTS = ("llama", "mixtral", "phi3", "gemma3", "opt", "falcon-40b", "bloom", "olmo2")
FORMS = {"w8a8": "w8a8", "w8a8 static": "static"}
OUT, V, UP, DOWN = (f"model.layers.1.{name}_proj" for name in ("self_attn.o", "self_attn.v", "mlp.up", "mlp.down"))
Folder = Callable[[Path], Path]


def stripped(folder: Path, out: Path) -> Path:
    """A folder of ours without what is ours in it."""
    shutil.copytree(folder, out)
    shutil.rmtree(out / OURS)
    return out


def one(folder: Path, model: Model, text: Text) -> Validation:
    (found,) = validate_engines({"it": folder}, model, text, device="cpu")
    return found


def changed(folder: Path, changes: dict[str, Callable[[Tensor], Tensor]]) -> Path:
    """A folder after some tensors are changed in it."""
    tensors = load_file(folder / "model.safetensors")
    tensors |= {name: change(tensors[name]).contiguous() for name, change in changes.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_we_record_is_recovered(layout: str, form: str, tmp_path: Path) -> None:
    """An export of ours without its record of the smoothing is the engine that the record describes."""
    case = Case(layout, tmp_path)
    model, text = case.model, Text(tuple(sample_ids(seed=5)), "sample")
    folder = case.export(form)
    scheme = read_scheme(folder)
    reference = Reference(model, text, [scheme])
    found = one(stripped(folder, tmp_path / "stripped"), model, text)
    recorded = reference.streams[scheme.key]
    assert found.unexplained == ""
    assert found.subject["engine"] == ANYBODY
    # the folder's norms are those of the rebuilt layers up to one rounding, so a value in 10^5 rounds the other way
    assert found.hidden_errors == pytest.approx(recorded.hidden_errors, rel=0.02)
    assert [linear.name for linear in found.linears] == [linear.name for linear in recorded.linears]
    for mine, theirs in zip(found.linears, recorded.linears, strict=True):
        # rows of 64 numbers, each off by 1/254 of the largest: their scale is off by 0.1 %, at 40 dB an error of 1 %
        assert mine.sqnr == pytest.approx(theirs.sqnr, abs=0.3), mine.name
    control = one(stripped(folder, tmp_path / "control"), model, text)
    assert control.linears == found.linears


@pytest.mark.parametrize("name", ["w8a8", "static", "naive"])
def test_metrics_are_those_of_the_rebuilt_engine(
    name: str, llama: Model, text: Text, folders: Path, tmp_path: Path
) -> None:
    scheme = read_scheme(folders / name)
    reference = Reference(llama, text, [scheme])
    manifest, foreign = open_int8_folder(stripped(folders / name, tmp_path / "out"), llama)
    again = Reference(llama, text, [foreign])
    for sequence in range(len(text.sequences)):
        ours, plain = reference.w8a8_logits(scheme, sequence), reference.logits(sequence)
        off = (again.w8a8_logits(foreign, sequence) - ours).norm() / (ours - plain).norm()
        assert off < 0.05  # a flip of one of 10^5 roundings is about 1 % of the error of quantization
    assert set(manifest.files) == {"config.json", "model.safetensors"}


def test_static_folders_are_what_transformers_computes(llama: Model, text: Text, folders: Path, tmp_path: Path) -> None:
    """compressed-tensors rounds static activations as we do (dynamic ones to another grid)."""
    _, scheme = open_int8_folder(stripped(folders / "static", tmp_path / "out"), llama)
    reference, engine = Reference(llama, text, [scheme]), TransformersEngine(folders / "static")
    for sequence, ids in enumerate(text.sequences):
        found, theirs = reference.w8a8_logits(scheme, sequence), engine.logits(ids[None])[0]
        assert (found - theirs).norm() < 0.05 * (theirs - reference.logits(sequence)).norm()


@pytest.mark.parametrize("name", ["q_proj", "v_proj", "o_proj", "up_proj", "down_proj"])
@pytest.mark.parametrize("smoothed", [False, True])
def test_a_doubled_scale_is_seen_where_it_is(
    name: str, smoothed: bool, llama: Model, text: Text, folders: Path, tmp_path: Path
) -> None:
    """In a folder without folds it is found in its linear. With them, of a pair that shares a fold both are named:
    nobody can tell which of them is the wrong one."""
    folder = stripped(folders / ("w8a8" if smoothed else "naive"), tmp_path / "out")
    before = one(folder, llama, text)
    (wrong,) = (linear.name for linear in before.linears if linear.layer == 1 and linear.name.endswith(name))
    found = one(changed(folder, {f"{wrong}.weight_scale": lambda scale: 2 * scale}), llama, text)
    pairs = ((V, OUT), (UP, DOWN))
    blamed = next((pair for pair in pairs if wrong in pair), (wrong,)) if smoothed else (wrong,)
    assert {linear.name for linear in found.worst[: len(blamed)]} == set(blamed)
    assert found.worst[0].sqnr < 1 < before.worst[0].sqnr
    for linear, same in zip(found.linears, before.linears, strict=True):
        if linear.name not in blamed:
            assert linear.sqnr == pytest.approx(same.sqnr, abs=0.3)
    assert found.metrics.kl_mean > before.metrics.kl_mean
    assert found.hidden_errors[1] > before.hidden_errors[1]


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("strategy", ["channel", "tensor"])
def test_folders_without_smoothing(
    strategy: str, scale_dtype: torch.dtype, llama: Model, text: Text, tmp_path: Path
) -> None:
    """Norms and linears are the model's own: of what is recovered, nothing differs from 1 by more than INT8 does."""
    folder = save_compressed_tensors(llama.checkpoint.folder, tmp_path / "out", strategy, scale_dtype=scale_dtype)
    _, scheme = open_int8_folder(folder, llama)
    assert scheme.unexplained == ""
    for scale in scheme.smoothing_scale.values():
        assert (scale - 1).abs().max() < 0.05
    found = one(folder, llama, text)
    assert len(found.linears) == 14


def test_a_pre_quant_scale_is_part_of_the_smoothing(llama: Model, text: Text, tmp_path: Path) -> None:
    """The engine multiplies the input by it: with the reciprocals of what smooths, the linear hurts less."""
    absmax = Reference(llama, text).act_absmax
    smoothing = {DOWN: 4 / absmax[DOWN].clamp_min(1e-3)}
    plain, smooth = (
        one(save_modelopt(llama.checkpoint.folder, tmp_path / name, given), llama, text)
        for name, given in (("plain", {}), ("smooth", smoothing))
    )
    assert (plain.unexplained, smooth.unexplained) == ("", "")
    before, after = ({linear.name: linear.sqnr for linear in found.linears} for found in (plain, smooth))
    assert before[OUT] == pytest.approx(after[OUT], abs=1e-6)
    assert after[DOWN] != pytest.approx(before[DOWN], abs=0.5)
    (reach,) = (found for found in smooth.ranges if found.layer == 1 and found.roles == ("down",))
    assert reach.after_max == pytest.approx(4, rel=0.01)  # the scale of up -> down, 1, is recovered to some 0.1 %


def rotated(folder: Path) -> Path:
    """A Llama whose residual stream is rotated: the same function in another basis, as QuaRot does it."""
    tensors = load_file(folder / "model.safetensors")
    turn = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(3)))[0]
    for name, tensor in tensors.items():
        if "layernorm" in name or name == "model.norm.weight":
            continue
        layer = name.partition(".self_attn")[0].partition(".mlp")[0]
        norm = {
            "self_attn": f"{layer}.input_layernorm.weight",
            "mlp": f"{layer}.post_attention_layernorm.weight",
        }.get(name.split(".")[3] if name.count(".") > 3 else "", "model.norm.weight")
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensors[name] = (turn.T @ tensor).contiguous()
        elif name == "model.embed_tokens.weight":
            tensors[name] = tensor @ turn
        else:
            tensors[name] = (tensor * tensors[norm]) @ turn
    for name in tensors:
        if "norm" in name:
            tensors[name] = torch.ones_like(tensors[name])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_a_rotated_folder_is_measured_and_not_explained(
    make_llama: Callable[..., Path], text: Text, tmp_path: Path
) -> None:
    model = open_llama(make_llama())
    turned = rotated(make_llama())
    assert (Reference(open_llama(turned), text).logits(0) - Reference(model, text).logits(0)).abs().max() < 1e-3
    found = one(save_compressed_tensors(turned, tmp_path / "out"), model, text)
    assert "as after a rotation" in found.unexplained
    assert (found.linears, len(found.hidden_errors)) == ((), 2)
    assert min(found.hidden_errors) > 1  # another basis
    assert found.metrics.kl_mean < 0.05  # and the same function
    assert Validation.from_dict(found.as_dict()) == found
    write_report(tmp_path / "report.html", [found])
    assert f"it: {found.unexplained}" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("rms_norm_eps", 1e-3, "norm_epsilon is 0.001; expected 1e-06, the reference's"),
        ("hidden_act", "gelu", "activation is gelu; expected silu"),
        ("model_type", "mistral", "model_type is mistral; expected llama"),
        ("rope_parameters", {"rope_type": "default", "rope_theta": 5e5}, "attention is"),
    ],
)
def test_another_architecture_is_refused(key: str, value: object, line: str, llama: Model, tmp_path: Path) -> None:
    folder = save_compressed_tensors(llama.checkpoint.folder, tmp_path / "out")
    edit_json(folder / "config.json", {key: value})
    with pytest.raises(UserError, match=line):
        open_int8_folder(folder, llama)


def test_another_shape_is_refused(llama: Model, make_llama: Callable[..., Path], tmp_path: Path) -> None:
    folder = save_compressed_tensors(make_llama(intermediate_size=96), tmp_path / "out")
    with pytest.raises(UserError, match="intermediate_size is 96; expected 128, the reference's"):
        open_int8_folder(folder, llama)


class Interrupt(KeyboardInterrupt):
    """Stands for Ctrl-C."""


def test_an_interrupted_validation_goes_on(
    llama: Model, text: Text, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("smoothquant.workroom.KEEP_EVERY", -1.0)
    folder = save_compressed_tensors(llama.checkpoint.folder, tmp_path / "out")
    whole = one(folder, llama, text)

    def stop(done: int, total: int) -> None:
        if done == 4:  # 2 layers, then sequences
            raise Interrupt

    with pytest.raises(Interrupt):
        validate_engines({"it": folder}, llama, text, device="cpu", work=tmp_path / "work", progress=stop)
    told: list[int] = []
    (found,) = validate_engines(
        {"it": folder}, llama, text, device="cpu", work=tmp_path / "work", progress=lambda done, _: told.append(done)
    )
    assert found == whole
    assert min(set(told) - {0, 2}) == 3
    changed(folder, {f"{V}.weight_scale": lambda scale: 2 * scale})  # another folder begins again
    (other,) = validate_engines({"it": folder}, llama, text, device="cpu", work=tmp_path / "work")
    assert other.metrics != found.metrics
    assert replace(other, samples=found.samples) != found


def test_layouts_are_of_the_zoo() -> None:
    assert set(LAYOUTS) <= set(zoo.ZOO)
