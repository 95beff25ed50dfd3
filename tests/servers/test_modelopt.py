"""ModelOpt's own INT8 folders (SmoothQuant, its usual settings) are read, reported on and converted.

It multiplies the input of every linear by a pre_quant_scale of its own. With one key head for each query head all of
them fold; where query heads share a kv head, that of o_proj does not.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from recipes.families import open_int8_model
from smoothquant.contract import relative_error
from tests.exporters.huggingface.test_convert import dequantized_logits
from tests.forked import smoothquant
from tests.int8_folders import linears
from tests.models import TEXT, sample_ids, save_llama
from tests.servers.environments import MODELOPT

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(MODELOPT.python is None, reason="python -m tests.servers modelopt makes its environment"),
]

WORKER = Path(__file__).with_name("modelopt_worker.py")
LAYERS = 2
ROUNDED = 2 * LAYERS * 2.0**-11  # two norms of each layer are rounded to float16 once more


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], tuple[Path, Path]]:
    """A Llama with so many kv heads for its 4 query heads, and what ModelOpt makes of it."""
    found: dict[int, tuple[Path, Path]] = {}

    def make(kv_heads: int) -> tuple[Path, Path]:
        if kv_heads not in found:
            root = tmp_path_factory.mktemp("modelopt")
            model = save_llama(root / "model", num_key_value_heads=kv_heads)
            command = [
                str(MODELOPT.python),
                "-I",
                str(WORKER),
                str(model),
                str(root / "int8"),
            ]  # triton is a folder here
            ran = subprocess.run(command, capture_output=True, text=True, check=False)
            assert ran.returncode == 0, ran.stderr[-3000:]
            found[kv_heads] = (model, root / "int8")
        return found[kv_heads]

    return make


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_every_number_is_read(kv_heads: int, made: Callable[[int], tuple[Path, Path]]) -> None:
    model, folder = made(kv_heads)
    tensors, found = load_file(folder / "model.safetensors"), open_int8_model(folder)
    assert (found.checkpoint.quantized.dialect, found.scheme.activations.static) == ("modelopt", True)
    for name in linears(load_file(model / "model.safetensors")):
        linear = found.linear(name)
        assert linear.input_scale is not None
        assert linear.pre_quant_scale is not None
        for part, value in vars(linear).items():
            assert torch.equal(value, tensors[f"{name}.{part}"].to(value.dtype)), (name, part)


def test_it_is_converted(
    made: Callable[[int], tuple[Path, Path]], tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    model, folder = made(4)
    command = ("convert", folder, "--to", "compressed-tensors", "--out", tmp_path / "out", "--quiet")
    assert smoothquant(*command).returncode == 0
    ids = sample_ids(seed=7)
    theirs = dequantized_logits(folder, model, ids)
    off = relative_error(dequantized_logits(tmp_path / "out", model, ids), theirs)
    assert off < ROUNDED
    tensors, name = load_file(tmp_path / "out/model.safetensors"), "model.layers.1.mlp.up_proj.weight_scale"
    save_file(tensors | {name: 2 * tensors[name]}, tmp_path / "out/model.safetensors", {"format": "pt"})  # the control
    assert relative_error(dequantized_logits(tmp_path / "out", model, ids), theirs) > 10 * ROUNDED
    record_property("modelopt", ["4 kv heads", "convert", f"{off:.1e} of the logits, at most {ROUNDED:.1e}"])


def test_what_does_not_fold_is_refused(
    made: Callable[[int], tuple[Path, Path]], tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    _, folder = made(2)
    found = smoothquant("convert", folder, "--to", "compressed-tensors", "--out", tmp_path / "out", "--quiet")
    said = "self_attn.o_proj has a pre_quant_scale that differs between query heads"
    assert (found.returncode, said in found.stderr, (tmp_path / "out").exists()) == (2, True, False)
    record_property("modelopt", ["2 kv heads", "convert", f"refused: {said}"])


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_it_is_reported_on(
    kv_heads: int,
    made: Callable[[int], tuple[Path, Path]],
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    model, folder = made(kv_heads)
    (tmp_path / "text.txt").write_text(TEXT)
    text = ("--text", tmp_path / "text.txt", "--samples", 4, "--length", 64, "--no-thresholds", "--json", "--quiet")
    found = smoothquant("validate", folder, "--reference", model, *text)
    assert found.returncode == 0, found.stderr
    [validation] = json.loads(found.stdout)["validations"]
    assert 0 < validation["metrics"]["kl_mean"] < 0.1
    record_property("modelopt", [f"{kv_heads} kv heads", "validate", f"KL {validation['metrics']['kl_mean']:.2g}"])
