"""What the tests of quantizers share: models quantized by a tool in its own environment, and our report on them."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from act_scales.text import Text
from builders.validate import Reference, Validation, validate_engines
from builders.validate.int8_folder import open_int8_folder
from smoothquant.model import Model
from tests import zoo
from tests.forked import smoothquant
from tests.models import TEXT, sample_ids, save_tokenizer
from tests.servers.environments import Environment

LAYOUTS = ("llama", "qwen2")
Name = tuple[str, str]  # layout, form
ENVIRONMENT = {  # of a worker: beside it lies `triton`, which is no package of its tool
    "PYTHONSAFEPATH": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "PATH": "/usr/bin:/bin",
}
FEW = ("--samples", 8, "--length", 64)


@dataclass(frozen=True)
class Quantizer:
    """A tool in its environment. names: of the folders that it writes."""

    environment: Environment
    root: Path
    names: tuple[Name, ...]

    @cached_property
    def models(self) -> dict[str, Path]:
        """Random models with a tokenizer."""
        layouts = dict.fromkeys(layout for layout, _ in self.names)
        made = {layout: zoo.save(layout, self.root / layout) for layout in layouts}
        for folder in made.values():
            save_tokenizer(folder)
        (self.root / "text.txt").write_text(TEXT)
        return made

    @cached_property
    def made(self) -> Mapping[Name, Path]:
        """The folders that the tool wrote, all by one process."""
        outs = [self.root / f"{layout}-{form.replace(' ', '-')}" for layout, form in self.names]
        jobs = [
            {"model": str(self.models[layout]), "out": str(out), "form": form}
            for (layout, form), out in zip(self.names, outs, strict=True)
        ]
        worker = Path(__file__).with_name(f"{self.environment.name.replace('-', '_')}_worker.py")
        found = subprocess.run(
            [str(self.environment.python), str(worker)],
            input=json.dumps({"jobs": jobs}),
            capture_output=True,
            text=True,
            check=False,
            cwd=self.root,
            env=ENVIRONMENT | {"HOME": str(self.root)},
        )
        answers = [json.loads(line) for line in found.stdout.splitlines() if line.startswith(('{"out"', '{"failed"'))]
        assert [answer.get("out") for answer in answers] == list(map(str, outs)), (answers, found.stderr[-3000:])
        return dict(zip(self.names, outs, strict=True))

    def command(self, layout: str, form: str, *options: object) -> subprocess.CompletedProcess[str]:
        """`smoothquant validate` of a folder."""
        words = ("--reference", self.models[layout], "--text", self.root / "text.txt", *FEW, "--quiet", *options)
        return smoothquant("validate", self.made[layout, form], *words)


def one(folder: Path, model: Model) -> Validation:
    """Our report on a folder, on random tokens."""
    (found,) = validate_engines({"it": folder}, model, Text(tuple(sample_ids()), "sample"), device="cpu")
    return found


@torch.no_grad()
def ours_and_theirs(folder: Path, model: Model) -> tuple[float, float]:
    """The distance of our logits of a folder to transformers', and that of transformers' to the float model's."""
    ids = sample_ids()
    _, scheme = open_int8_folder(folder, model)
    reference = Reference(model, Text(tuple(ids), "sample"), [scheme])
    plain = torch.stack([reference.logits(sequence) for sequence in range(len(ids))])
    ours = torch.stack([reference.w8a8_logits(scheme, sequence) for sequence in range(len(ids))])
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
    return apart(ours, theirs), apart(theirs, plain)


def apart(one: Tensor, other: Tensor) -> float:
    return (one - other).norm().item()


def doubled(folder: Path, name: str, out: Path) -> Path:
    """A copy of a folder in which a linear's weight_scale is twice as large."""
    out.mkdir()
    for path in folder.iterdir():
        (out / path.name).symlink_to(path)
    tensors = load_file(folder / "model.safetensors")
    (out / "model.safetensors").unlink()
    tensors[f"{name}.weight_scale"] *= 2
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out
