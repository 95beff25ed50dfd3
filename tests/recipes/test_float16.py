"""A residual stream that float16 cannot hold, through the commands: said when it is exported, and when it is validated.

Nothing that runs here shows it by itself: ONNX Runtime's CPU computes float16 graphs in float32.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from builders.validate import Validation
from recipes.cli import main
from tests.models import save_llama, stretch_residual

FLOAT16 = {  # target and its options: with float16, and the way out that the refusal names
    "onnx": (("onnx", "--dtype", "fp16"), ("onnx", "--dtype", "fp32"), "export with --dtype fp32, or for TensorRT"),
    "tensorrt": (
        ("onnx", "--for", "tensorrt", "--dtype", "fp16"),
        ("onnx", "--for", "tensorrt"),
        "export with --dtype fp32, or for TensorRT with --dtype bf16",
    ),
    "float onnx": (("onnx", "--float", "--dtype", "fp16"), ("onnx", "--float"), "export with --dtype fp32"),
    "trtllm": (("trtllm", "--dtype", "float16"), ("trtllm",), "export with --dtype bfloat16"),
    "modelopt": (("modelopt",), ("w8a8",), "use export w8a8 with bfloat16"),
    "hf": (("hf", "--dtype", "float16"), ("hf",), "export with --dtype bfloat16"),
}

Command = Callable[..., tuple[int, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Command:
    """Run a command; returns its status and what it says on stderr."""

    def run(*arguments: object) -> tuple[int, str]:
        capsys.readouterr()
        status = main([*map(str, arguments), "--quiet"])
        return status, capsys.readouterr().err.strip()

    return run


class Calibrated:
    """A bfloat16 model whose residual stream reaches 1e3 or 1e5, its act scales, and the same in the published form."""

    def __init__(self, root: Path, reach: float, text: Path) -> None:
        self.reach, self.model, self.text = reach, save_llama(root / "model", dtype=torch.bfloat16), text
        stretch_residual(self.model, reach)
        self.scales, self.published = root / "a.safetensors", root / "a.pt"
        calibrate = ("--text", str(text), "--samples", "4", "--length", "64", "--out", str(self.scales), "--quiet")
        assert main(["calibrate", str(self.model), *calibrate]) == 0
        assert main(["scales", "convert", str(self.scales), "--out", str(self.published), "--quiet"]) == 0


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Calibrated:
    return Calibrated(tmp_path_factory.mktemp("wide"), 1e5, text_file)


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory, text_file: Path) -> Calibrated:
    return Calibrated(tmp_path_factory.mktemp("narrow"), 1e3, text_file)


def validate(run: Command, case: Calibrated, engine: Path, *more: str) -> tuple[int, str, Validation | None]:
    """Status, stderr, and the result where there is one."""
    out = engine.with_name(f"{engine.name}.json")
    text = ("--text", case.text, "--samples", 40, "--length", 64)
    status, err = run("validate", engine, "--reference", case.model, *text, "--out", out, *more)
    found = Validation.from_dict(json.loads(out.read_text())["validations"][0]) if out.exists() else None
    return status, err, found


@pytest.mark.parametrize("target", FLOAT16)
def test_an_export_in_float16_is_refused(target: str, wide: Calibrated, run: Command, tmp_path: Path) -> None:
    half, other, way_out = FLOAT16[target]
    status, err = run("export", half[0], wide.model, wide.scales, *half[1:], "--out", tmp_path / "half")
    assert (status, err.count("\n")) == (2, 0)
    assert "half: float16 cannot hold this model: the residual stream of model.layers.0 reaches" in err
    assert f"expected at most 52403: other text may reach further, and float16 ends at 65504; {way_out}" in err
    assert not list(tmp_path.iterdir())
    assert run("export", other[0], wide.model, wide.scales, *other[1:], "--out", tmp_path / "other") == (0, "")


@pytest.mark.parametrize("target", FLOAT16)
def test_a_smaller_residual_is_none_of_it(target: str, narrow: Calibrated, run: Command, tmp_path: Path) -> None:
    half = FLOAT16[target][0]
    command = ("export", half[0], narrow.model, narrow.scales, *half[1:], "--out", tmp_path / "half")
    assert run(*command) == (0, "")


def test_a_checkpoint_is_of_the_dtype_that_its_config_says(wide: Calibrated, run: Command, tmp_path: Path) -> None:
    config = wide.model / "config.json"
    before = config.read_text()
    command = ("export", "w8a8", wide.model, wide.scales, "--out", tmp_path / "out")
    try:
        config.write_text(json.dumps({**json.loads(before), "dtype": "float16"}))
        again = tmp_path / "again.safetensors"  # a model with another config is another model
        text = ("--text", wide.text, "--samples", 4, "--length", 64)
        assert run("calibrate", wide.model, *text, "--out", again)[0] == 0
        status, err = run("export", "w8a8", wide.model, again, "--out", tmp_path / "out")
    finally:
        config.write_text(before)
    assert status == 2
    assert "float16 cannot hold this model" in err
    assert 'write "torch_dtype": "bfloat16" into config.json' in err
    assert run(*command) == (0, "")


def test_scales_that_do_not_tell_are_a_note(wide: Calibrated, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    said = "nothing here says how far this model reaches"
    for number, (dtype, scales, noted) in enumerate(
        (("fp16", wide.published, True), ("fp32", wide.published, False), ("fp32", wide.scales, False))
    ):
        out = tmp_path / str(number)
        capsys.readouterr()
        assert main(["export", "onnx", str(wide.model), str(scales), "--dtype", dtype, "--out", str(out)]) == 0
        told = " ".join(capsys.readouterr().err.split())
        assert (said in told) == noted, told


@pytest.mark.parametrize("target", ["onnx", "float onnx", "hf"])
def test_validation_says_what_a_cpu_cannot_show(
    target: str, wide: Calibrated, narrow: Calibrated, run: Command, tmp_path: Path
) -> None:
    half = FLOAT16[target][0]
    for case, name in ((wide, "wide"), (narrow, "narrow")):
        out = tmp_path / name
        assert run("export", half[0], case.model, case.published, *half[1:], "--out", out)[0] == 0
        status, err, found = validate(run, case, out, "--report", str(tmp_path / f"{name}.html"))
        assert found is not None
        assert found.metrics.relative_error < 0.5  # the engine itself looks well
        page = (tmp_path / f"{name}.html").read_text()
        if case is narrow:
            assert (status, err, found.overflow) == (0, "", "")
            assert "Missed" not in page
            continue
        assert (status, err.count("\n"), found.passed) == (1, 0, False)
        assert "wide: the residual stream of model.layers.0 reaches" in err
        assert "on this text, and the engine's float16 holds at most 65504" in err
        assert "run here in float32, which does not show it: export in bfloat16 or float32" in err
        assert "Missed: wide" in page
        assert found.overflow in page.replace("&#39;", "'")


def test_a_tensorrt_llm_checkpoint_overflows_here_as_it_does_there(
    wide: Calibrated, narrow: Calibrated, run: Command, tmp_path: Path
) -> None:
    for case, name in ((wide, "wide"), (narrow, "narrow")):
        for dtype in ("float16", "bfloat16"):
            out = tmp_path / f"{name}-{dtype}"
            assert run("export", "trtllm", case.model, case.published, "--dtype", dtype, "--out", out)[0] == 0
            status, err, found = validate(run, case, out)
            if (name, dtype) == ("wide", "float16"):
                assert (status, err.count("\n"), found) == (1, 0, None)
                assert "the engine's logits hold nan, first at sequence 0" in err
                assert "the residual stream of model.layers.0 reaches" in err
                assert err.endswith("holds at most 65504; export in bfloat16 or float32")
            else:
                assert (status, err) == (0, "")
                assert found is not None
                assert found.overflow == ""
                assert found.metrics.relative_error < 0.5


def test_calibration_and_show_tell_it_first(
    wide: Calibrated, narrow: Calibrated, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    for case, told in ((wide, True), (narrow, False)):
        out = tmp_path / f"{case.reach}.safetensors"
        text = ("--text", str(case.text), "--samples", "4", "--length", "64", "--out", str(out))
        assert main(["calibrate", str(case.model), *text]) == 0
        said = " ".join(capsys.readouterr().err.split())
        assert ("which float16 may not hold: export in bfloat16 or float32" in said) == told
        assert main(["scales", "show", str(out), "--json"]) == 0
        held = json.loads(capsys.readouterr().out)["held"]
        assert held.keys() == {"model.layers.0", "model.layers.1", "lm_head"}
        assert held["model.layers.1"] == pytest.approx(case.reach, rel=0.3)  # on other text than it was stretched for
