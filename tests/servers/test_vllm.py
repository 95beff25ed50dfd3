"""vLLM, on the CPU, does with what `export w8a8` writes what the table of readers says that it does.

What is compared are the log-probabilities of prompts, by their mean absolute difference.

float   vLLM computes in bfloat16, so it is as far from float32 as transformers in bfloat16 is, within a factor of two.
W8A8    our own W8A8 arithmetic is the yardstick. Two W8A8 arithmetics that round their inputs independently of each
        other are sqrt(2) times as far from each other as one is from the float model. vLLM must be nearer than that.
        A weight_scale of any linear that is twice as large in every other channel, or an input_scale that is half as
        large, takes it farther away. (In every channel it would not always: norms of queries, keys and branches take
        a common factor out again. Linears that vLLM fuses share one input_scale, so it is changed in all of them.)

What vLLM does depends on the processor: with AMX or without. The table knows both.
"""

from __future__ import annotations

import functools
import math
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from builders.readers import FolderFacts, Outcome, facts_of, judge
from builders.readers.devices import this_cpu
from smoothquant.scheme import scheme_of
from tests import zoo
from tests.families.case import Case
from tests.models import sample_ids
from tests.servers.environments import VLLM
from tests.servers.in_vllm import in_vllm

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(VLLM.python is None, reason="python -m tests.servers vllm makes vLLM's environment"),
]

Record = Callable[[str, object], None]

WIDE = {"hidden_size": 256, "num_attention_heads": 4}  # heads of 64 channels: vLLM's kernels take no fewer than 32
FORMS = {"per-token": "w8a8", "per-tensor": "w8a8 static"}  # of a `Case`
MODELOPT = "modelopt"
CHANGED = {"per-token": "weight_scale", "per-tensor": "input_scale"}  # what the controls change, by activations
LAYOUTS: dict[str, dict[str, object]] = {
    "llama": {"head_dim": 64},
    "llama-tied": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {"head_dim": 64},
    "phi3": {},
    "gemma2": {"head_dim": 64, "query_pre_attn_scalar": 64},
    "gemma3": {"head_dim": 64, "query_pre_attn_scalar": 64},
    "granite": {},
    "olmo2": {},
    "opt": {},
    "falcon-7b": {},
    "falcon-40b": {},
    "bloom": {},
    "mixtral": {},
}
VARIANTS: dict[str, dict[str, object]] = {  # of those above, whose loaders they share: their scales are not changed
    "llama-biased": {"head_dim": 64},
    "llama-scaled": {"head_dim": 64},
    "mistral-nemo": {"head_dim": 96},
    "mixtral-sliding": {},
    "falcon-11b": {"ffn_hidden_size": 1024},  # vLLM takes it for four times the hidden size, as it is in 11B
    "falcon-rw": {},
    "opt-350m": {},
    "qwen2-sliding": {},
    "qwen3-tied": {"head_dim": 64},
    "qwen3-yarn": {"head_dim": 64},
    "qwen3-moe": {"head_dim": 64},
    "phi3-sliding": {},
    "phi3-partial": {},
}


def facts(name: str, act: str) -> FolderFacts:
    """What the table is asked about: the export of a layout, or the model ("float")."""
    config = zoo.build(name).config.to_dict()
    return facts_of("float" if act == "float" else "compressed-tensors", scheme_of(act), config)


FACTS = {(name, act): facts(name, act) for name in LAYOUTS | VARIANTS for act in ("float", *FORMS)}
STATEMENTS = {key: judge(folder, "vllm", this_cpu()) for key, folder in FACTS.items()}


def told(outcome: Outcome, forms: tuple[str, ...] = tuple(FORMS)) -> list[tuple[str, str]]:
    """The layouts and activations of which the table says this."""
    return [key for key, statement in STATEMENTS.items() if statement.outcome is outcome and key[1] in forms]


class Served:
    """What vLLM gives for the folders of one layout. All are loaded by one process."""

    def __init__(self, case: Case) -> None:
        self.case, self.ids = case, sample_ids()

    @cached_property
    def answers(self) -> dict[str, dict]:
        """What vLLM says to each folder: of the model, of an export ("per-token"), of one with a scale of another size
        ("per-token NAME")."""
        folders = {"float": self.case.folder}
        for act, form in FORMS.items():
            folders[act] = self.case.export(form)
            if self.case.name in LAYOUTS and STATEMENTS[self.case.name, act].outcome.serves:
                folders |= {f"{act} {names[0]}": changed(folders[act], names) for names in self.scales(act)}
        if self.case.name == "llama":
            folders[MODELOPT] = self.case.export(MODELOPT)
        return dict(zip(folders, in_vllm(list(folders.values()), self.ids.tolist()), strict=True))

    def scales(self, act: str) -> list[list[str]]:
        """Names of the scales of the first layer, every expert's too; those that a control changes together."""
        tensors = load_file(self.case.export(FORMS[act]) / "model.safetensors")
        ends = f".{CHANGED[act]}"
        names = [name for name in sorted(tensors) if name.endswith(ends) and ".0." in name.partition("experts")[0]]
        if act == "per-token":
            return [[name] for name in names]
        together: dict[float, list[str]] = {}
        for name in names:
            together.setdefault(tensors[name].item(), []).append(name)
        return list(together.values())

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
            made[name] = Served(Case(name, tmp_path_factory.mktemp(name), WIDE | (LAYOUTS | VARIANTS)[name]))
        return made[name]

    return find


def changed(folder: Path, names: list[str]) -> Path:
    """A copy of a folder in which scales are others."""
    out = folder.with_name(f"{folder.name} {names[0]}")
    shutil.copytree(folder, out)
    tensors = load_file(out / "model.safetensors")
    for name in names:
        scale = tensors[name].clone()
        scale[::2] *= 2.0 if name.endswith("weight_scale") else 0.5  # a smaller input_scale clips
        tensors[name] = scale
    save_file(tensors, out / "model.safetensors", {"format": "pt"})
    return out


def log_probabilities(logits: Tensor, ids: Tensor) -> Tensor:
    """Of every token that follows another one, float64 (batch, tokens - 1)."""
    found = logits.double().log_softmax(-1)[:, :-1]
    return found.gather(2, ids[:, 1:, None])[..., 0]


def apart(one: Tensor, other: Tensor) -> float:
    return (one - other).abs().mean().item()


def record(keep: Record, name: str, act: str, outcome: Outcome, found: str) -> None:
    """Keep what vLLM did, for the table of readers."""
    folder = asdict(FACTS[name, act])
    keep("run", {"reader": "vllm", "layout": name, "folder": folder, "outcome": outcome.value, "found": found})


@pytest.mark.parametrize("name", [name for name, _ in told(Outcome.AS_WRITTEN, ("float",))])
def test_a_float_model_is_the_models(name: str, served: Callable[[str], Served], record_property: Record) -> None:
    """The comparison as such: of the model before anything of ours is done to it."""
    given = served(name)
    plain = AutoModelForCausalLM.from_pretrained(given.case.folder, dtype=torch.bfloat16)
    with torch.no_grad():
        rounded = log_probabilities(plain(given.ids).logits, given.ids)
    off, limit = apart(given.given("float"), given.float32), 2 * apart(rounded, given.float32)
    assert off <= limit
    record(record_property, name, "float", Outcome.AS_WRITTEN, f"{off:.3f} of {limit:.3f}")


@pytest.mark.parametrize(("name", "act"), told(Outcome.AS_WRITTEN))
def test_it_is_computed_as_written(
    name: str, act: str, served: Callable[[str], Served], record_property: Record
) -> None:
    """As far as from our own arithmetic as another one may be, and any scale of the first layer matters."""
    given = served(name)
    off, limit = apart(given.given(act), given.w8a8(act)), given.limit(act)
    assert off < limit
    assert set(given.answers[act]["kernels"]) <= set(STATEMENTS[name, act].kernel.split(", "))
    if name in LAYOUTS:
        found = {scale: apart(given.given(f"{act} {scale}"), given.w8a8(act)) for scale, *_ in given.scales(act)}
        assert found
        assert {scale: off for scale, off in found.items() if off < limit} == {}
    record(record_property, name, act, Outcome.AS_WRITTEN, f"{off:.3f} of {limit:.3f}")


@pytest.mark.parametrize(("name", "act"), told(Outcome.OTHERWISE))
def test_static_activations_are_computed_as_dynamic_ones(
    name: str, act: str, served: Callable[[str], Served], record_property: Record
) -> None:
    given = served(name)
    if name in LAYOUTS:
        scales = given.scales(act)
        assert scales
        assert all(torch.equal(given.given(act), given.given(f"{act} {scale}")) for scale, *_ in scales)
    record(record_property, name, act, Outcome.OTHERWISE, "another input_scale changes nothing")


@pytest.mark.parametrize(("name", "act"), told(Outcome.REFUSED, ("float", *FORMS)))
def test_it_is_refused(name: str, act: str, served: Callable[[str], Served], record_property: Record) -> None:
    said = STATEMENTS[name, act].said
    assert said
    assert said in served(name).answers[act].get("refused", "")
    record(record_property, name, act, Outcome.REFUSED, said)


def test_a_modelopt_folder_is_refused(served: Callable[[str], Served], record_property: Record) -> None:
    folder = replace(FACTS["llama", "per-tensor"], form=MODELOPT)
    said = judge(folder, "vllm", this_cpu()).said
    assert said
    assert said in served("llama").answers[MODELOPT].get("refused", "")
    found = {"reader": "vllm", "layout": "llama", "folder": asdict(folder), "outcome": Outcome.REFUSED.value}
    record_property("run", found | {"found": said})
