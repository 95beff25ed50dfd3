"""vLLM, on the CPU, reads what `export w8a8` writes: as written, or not at all where the table says so.

What is compared are the log-probabilities of prompts, by their mean absolute difference.

float   vLLM computes in bfloat16, so it is as far from float32 as transformers in bfloat16 is, within a factor of two.
W8A8    our own W8A8 arithmetic is the yardstick. Two W8A8 arithmetics that round their inputs independently of each
        other are sqrt(2) times as far from each other as one is from the float model. vLLM must be nearer than that.
        A doubled weight_scale of any linear takes it farther away.

What vLLM's CPU kernels do depends on the CPU. With AMX they compute static activations as dynamic ones and take experts
in INT8; without it they compute static activations as written and refuse experts.
"""

from __future__ import annotations

import functools
import json
import math
import shutil
import subprocess
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from smoothquant.machine import cpu_flags
from tests.families.case import Case
from tests.models import sample_ids
from tests.servers.environments import VLLM

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(VLLM.python is None, reason="python -m tests.servers vllm makes vLLM's environment"),
]

Record = Callable[[str, object], None]

WORKER = Path(__file__).with_name("vllm_worker.py")
WIDE = {"hidden_size": 256, "num_attention_heads": 4}  # heads of 64 channels: vLLM's kernels take no fewer than 32
KERNELS = ["CPUInt8ScaledMMLinearKernel"]
AMX = "amx_int8" in cpu_flags()
FOLDERS = {"per-token": "w8a8", "per-tensor": "w8a8 static"}  # of a `Case`
DENSE: dict[str, dict[str, object]] = {
    "llama": {"head_dim": 64},
    "llama-tied": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {"head_dim": 64},
    "phi3": {},
    "gemma3": {"head_dim": 64, "query_pre_attn_scalar": 64},
    "opt": {},
    "falcon-7b": {},
    "falcon-40b": {},
    "bloom": {},
}
EXPERTS: dict[str, dict[str, object]] = {"mixtral": {}}
LAYOUTS = DENSE | EXPERTS
REFUSED = {  # layout, activations: what vLLM says
    ("bloom", "per-tensor"): "is invalid for input of size 1",
    ("mixtral", "per-tensor"): "Unsupported FusedMoe scheme",
} | ({} if AMX else {("mixtral", "per-token"): "No Int8 MoE backend supports"})
SERVED = [(name, act) for name in LAYOUTS for act in FOLDERS if (name, act) not in REFUSED]


class Served:
    """What vLLM gives for the folders of one layout. All are loaded by one process."""

    def __init__(self, case: Case) -> None:
        self.case, self.ids = case, sample_ids()

    @cached_property
    def answers(self) -> dict[str, dict]:
        """What vLLM says to each folder: of the model, of an export ("per-token"), of one with a scale of another size
        ("per-token NAME")."""
        folders = {"float": self.case.folder}
        for act, form in FOLDERS.items():
            folders[act] = self.case.export(form)
            if (self.case.name, act) not in REFUSED:
                names = [*self.scales(act), *(self.scales(act, "input_scale") if AMX else ())]
                folders |= {f"{act} {name}": doubled(folders[act], name) for name in names}
        asked = {"folders": [str(folder) for folder in folders.values()], "sequences": self.ids.tolist()}
        found = subprocess.run(
            [str(VLLM.python), str(WORKER)], input=json.dumps(asked), capture_output=True, text=True, check=False
        )
        answers = [json.loads(line) for line in found.stdout.splitlines() if line.startswith("{")]
        assert len(answers) == len(folders), found.stderr[-2000:]
        return dict(zip(folders, answers, strict=True))

    def scales(self, act: str, kind: str = "weight_scale") -> list[str]:
        """Names of the scales of the first layer. kind: "weight_scale" or "input_scale"."""
        names = sorted(load_file(self.case.export(FOLDERS[act]) / "model.safetensors"))
        return [name for name in names if name.endswith(kind) and ".0." in name.partition("experts")[0]]

    def given(self, form: str) -> Tensor:
        """The log-probabilities of all tokens that follow another one."""
        answer = self.answers[form]
        assert "refused" not in answer, answer["refused"]
        return torch.tensor(answer["log_probabilities"], dtype=torch.float64)

    @cached_property
    def float32(self) -> Tensor:
        return log_probabilities(self.case.logits(self.ids), self.ids)

    @functools.cache  # noqa: B019 (as long as the layout is)
    def w8a8(self, act: str) -> Tensor:
        """By our own arithmetic."""
        return log_probabilities(self.case.w8a8(self.ids, act), self.ids)

    def limit(self, act: str) -> float:
        """How far two W8A8 arithmetics may be apart."""
        return math.sqrt(2) * apart(self.w8a8(act), self.float32)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Served]:
    made: dict[str, Served] = {}

    def find(name: str) -> Served:
        if name not in made:
            made[name] = Served(Case(name, tmp_path_factory.mktemp(name), WIDE | LAYOUTS[name]))
        return made[name]

    return find


def doubled(folder: Path, name: str) -> Path:
    """A copy of a folder in which a tensor is twice as large."""
    out = folder.with_name(f"{folder.name} {name}")
    shutil.copytree(folder, out)
    tensors = load_file(out / "model.safetensors")
    save_file(tensors | {name: 2 * tensors[name]}, out / "model.safetensors", {"format": "pt"})
    return out


def log_probabilities(logits: Tensor, ids: Tensor) -> Tensor:
    """Of every token that follows another one, float64 (batch, tokens - 1)."""
    found = logits.double().log_softmax(-1)[:, :-1]
    return found.gather(2, ids[:, 1:, None])[..., 0]


def apart(one: Tensor, other: Tensor) -> float:
    return (one - other).abs().mean().item()


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_float_model_is_the_models(name: str, served: Callable[[str], Served], record_property: Record) -> None:
    """The comparison as such: of the model before anything of ours is done to it."""
    given = served(name)
    plain = AutoModelForCausalLM.from_pretrained(given.case.folder, dtype=torch.bfloat16)
    with torch.no_grad():
        rounded = log_probabilities(plain(given.ids).logits, given.ids)
    off, limit = apart(given.given("float"), given.float32), 2 * apart(rounded, given.float32)
    record_property("vllm", [name, "float", f"{off:.3f}", f"{limit:.3f}"])
    assert off <= limit


@pytest.mark.parametrize(("name", "act"), [row for row in SERVED if not (AMX and row[1] == "per-tensor")])
def test_it_is_computed_as_written(
    name: str, act: str, served: Callable[[str], Served], record_property: Record
) -> None:
    given = served(name)
    off = apart(given.given(act), given.w8a8(act))
    record_property("vllm", [name, act, f"{off:.3f}", f"{given.limit(act):.3f}"])
    assert off < given.limit(act)
    assert given.answers[act]["kernels"] == KERNELS


@pytest.mark.parametrize(("name", "act"), [row for row in SERVED if not (AMX and row[1] == "per-tensor")])
def test_a_doubled_scale_is_seen(name: str, act: str, served: Callable[[str], Served]) -> None:
    """The control: of every linear of the first layer, every expert's too."""
    given = served(name)
    found = {scale: apart(given.given(f"{act} {scale}"), given.w8a8(act)) for scale in given.scales(act)}
    assert found
    assert {scale: off for scale, off in found.items() if off < given.limit(act)} == {}


@pytest.mark.skipif(not AMX, reason="on this CPU vLLM computes static activations as written")
@pytest.mark.parametrize("name", [name for name, act in SERVED if act == "per-tensor"])
def test_static_activations_are_computed_as_dynamic_ones(
    name: str, served: Callable[[str], Served], record_property: Record
) -> None:
    given = served(name)
    record_property("vllm", [name, "per-tensor", "computed per token", ""])
    inputs = given.scales("per-tensor", "input_scale")
    assert all(torch.equal(given.given("per-tensor"), given.given(f"per-tensor {scale}")) for scale in inputs)


@pytest.mark.parametrize(("name", "act"), REFUSED)
def test_it_is_refused(name: str, act: str, served: Callable[[str], Served], record_property: Record) -> None:
    record_property("vllm", [name, act, f"refused: {REFUSED[name, act]}", ""])
    assert REFUSED[name, act] in served(name).answers[act].get("refused", "")
