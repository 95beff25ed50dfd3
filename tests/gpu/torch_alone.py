"""What PyTorch alone tells on a GPU, beside the CPU: without TensorRT, without a network, on the bundled model.

    python -m tests.gpu.torch_alone --device cuda

On the CPU (--device cpu) it compares the CPU with itself: that shows that the checks run, and nothing of a GPU.
"""

from __future__ import annotations

import argparse
import tempfile
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from act_scales.collect import collect
from act_scales.store import load_act_scales
from act_scales.text import load_text
from builders.validate.reference import HeldOutText
from builders.validate.run import validate_engines
from exporters.export import Source, export
from exporters.huggingface.modelopt import ModelOptWriter
from recipes import tiny_llama
from recipes.families import open_model
from recipes.models import RECIPES
from recipes.recipe import find
from recipes.reproduce import reproduce, whole_blocks
from smoothquant.errors import MissingPackageError
from smoothquant.model import Model
from smoothquant.quantization import quantize_input, quantize_weight, w8a8_linear
from smoothquant.scheme import PER_TOKEN
from tests.gpu.outcomes import FAILED, NOT_RUN, OK, record

ROWS, SAMPLES, LENGTH = 32, 4, 64  # _int_mm on CUDA takes more than 16 rows, and multiples of 8 elsewhere


@dataclass(frozen=True)
class Here:
    """Where a check runs. device: "cuda" or "cpu". folder: an empty folder for its files."""

    device: str
    folder: Path
    model: Model

    def scales(self, device: str) -> Path:
        """Act scales of the bundled model, computed on a device."""
        path, text = self.folder / f"{device.replace(':', '-')}.safetensors", tiny_llama.CALIBRATION_TEXT
        collect(self.model, load_text(text, tiny_llama.PATH, SAMPLES, LENGTH), path, dtype="float32", device=device)
        return path


def exact_products(here: Here) -> str:
    """torch._int_mm against sums in int64, with random integers and with the largest."""
    generator = torch.Generator().manual_seed(0)
    for inner, columns in ((64, 64), (4096, 256), (11008, 64)):
        random = torch.randint(-128, 128, (ROWS + columns, inner), generator=generator, dtype=torch.int8)
        for both in (random, torch.full_like(random, -128)):
            x, weight = both[:ROWS], both[ROWS:]
            found = torch._int_mm(x.to(here.device), weight.to(here.device).T).cpu()
            wrong = int((found != x.long() @ weight.long().T).sum())
            assert not wrong, f"{wrong} of {found.numel()} sums over {inner} channels are wrong"
    return "all sums equal, up to 11008 channels"


def layers(here: Here) -> str:
    """Every linear of the bundled model in W8A8: integers by torch._int_mm on the device against the CPU's output."""
    generator, errors = torch.Generator().manual_seed(0), []
    for name, weight in load_file(tiny_llama.PATH / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            continue
        integers, scale = quantize_weight(weight)
        x = torch.randn(ROWS, weight.shape[1], generator=generator)
        expected = w8a8_linear(x, integers, scale, PER_TOKEN.activations)
        tokens, token_scale = quantize_input(x.to(here.device), PER_TOKEN.activations)
        product = torch._int_mm(tokens.to(torch.int8), integers.to(here.device).T).float()
        by_integers = product * token_scale * scale.to(here.device)
        there = (tensor.to(here.device) for tensor in (x, integers, scale))
        by_floats = w8a8_linear(*there, PER_TOKEN.activations)
        errors += [_distance(found.cpu(), expected) for found in (by_integers, by_floats)]
    assert max(errors) < 1e-3, f"outputs are {max(errors):.1e} apart"
    return f"{len(errors) // 2} linears, at most {max(errors):.1e} apart"


def calibration(here: Here) -> str:
    """calibrate on the device against the CPU."""
    found, expected = (load_file(here.scales(device)) for device in (here.device, "cpu"))
    assert found.keys() == expected.keys()
    error = max(_distance(found[name].float(), expected[name].float()) for name in expected)
    assert error < 1e-3, f"act scales are {error:.1e} apart"
    return f"{len(expected)} ranges, at most {error:.1e} apart"


def validation(here: Here) -> str:
    """validate of a W8A8 folder, whose layers and reference run on the device, against the CPU."""
    scales = load_act_scales(here.scales("cpu")).for_model(here.model)
    recipe = find("tiny-llama", RECIPES)
    names = {"model": here.model.checkpoint.fingerprint}
    source = Source(here.model, recipe.settings(here.model), scales.input_absmax, names, scales.output_absmax)
    export(source, [ModelOptWriter(here.folder / "w8a8")])
    text = load_text(tiny_llama.EVALUATION_TEXT, tiny_llama.PATH, SAMPLES, LENGTH)
    found, expected = (_perplexity(here, text, device) for device in (here.device, "cpu"))
    assert abs(found / expected - 1) < 5e-3, f"perplexity {found:.4f}, on the CPU {expected:.4f}"
    return f"perplexity {found:.4f}, on the CPU {expected:.4f}"


def reproduction(here: Here) -> str:
    """reproduce on the bundled model, on the device against the CPU."""
    text = whole_blocks(str(tiny_llama.EVALUATION_TEXT), here.model, SAMPLES, LENGTH)
    recipe, scales = find("tiny-llama", RECIPES), here.scales("cpu")
    found, expected = (
        reproduce(recipe, here.model, scales, text, here.folder / f"r-{number}", device=device).measured
        for number, device in enumerate((here.device, "cpu"))
    )
    for ours, theirs in ((found.plain, expected.plain), (found.w8a8, expected.w8a8)):
        assert abs(ours / theirs - 1) < 5e-3, f"{ours:.4f}, on the CPU {theirs:.4f}"
    return f"float {found.plain:.4f}, W8A8 {found.w8a8:.4f}; on the CPU {expected.plain:.4f}, {expected.w8a8:.4f}"


CHECKS: Mapping[str, Callable[[Here], str]] = {
    "torch._int_mm against exact integers": exact_products,
    "W8A8 linears by torch._int_mm": layers,
    "calibrate": calibration,
    "validate --device": validation,
    "reproduce --device": reproduction,
}


def run(device: str) -> bool:
    """Run every check, whatever became of those before it. Returns whether none failed."""
    whole, model = True, open_model(tiny_llama.PATH)
    with tempfile.TemporaryDirectory() as scratch:
        for number, (name, check) in enumerate(CHECKS.items()):
            folder = Path(scratch, str(number))
            folder.mkdir()
            try:
                record(name, OK, check(Here(device, folder, model)))
            except MissingPackageError as error:
                record(name, NOT_RUN, str(error))
            except Exception as error:  # one check's fault is no other's
                traceback.print_exc()
                record(name, FAILED, f"{type(error).__name__}: {error}")
                whole = False
    return whole


def _perplexity(here: Here, text: HeldOutText, device: str) -> float:
    [found] = validate_engines({"w8a8": here.folder / "w8a8"}, here.model, text, device=device)
    return found.metrics.perplexity


def _distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--device", default="cuda")
    device = parser.parse_args().device
    if device.startswith("cuda") and not torch.cuda.is_available():
        record("PyTorch on the GPU", NOT_RUN, "PyTorch finds no CUDA GPU or driver")
        return 0
    return 0 if run(device) else 1


if __name__ == "__main__":
    raise SystemExit(main())
