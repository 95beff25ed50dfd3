"""The table of readers: nothing in it is dead, and what servers did is what it says."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import pytest

from builders.readers import (
    READERS,
    STATEMENTS,
    Device,
    FolderFacts,
    Outcome,
    check_served,
    device_of,
    facts_of,
    in_short,
    judge,
    opinions,
)
from builders.readers.devices import GPUS, Hardware
from builders.readers.runs import ReaderRun, confirming, evidence, load_runs
from smoothquant.errors import UserError
from smoothquant.scheme import PER_TOKEN

FORMS = {statement.form for statement in STATEMENTS}
MODELS = {"llama", *(name for statement in STATEMENTS for name in statement.model_types)}
CAPABILITIES = (70, *sorted({*GPUS.values()}))
DEVICES = [device_of(name) for name in ("cpu", "cpu-amx")] + [Device(str(number), number) for number in CAPABILITIES]


def folders() -> Iterator[FolderFacts]:
    flags = (True, False)
    for facts in product(FORMS, MODELS, ("per-token", "per-tensor", "float"), flags, flags):
        yield FolderFacts(*facts)


def test_no_row_is_hidden_by_those_before_it() -> None:
    reached = {judge(folder, reader, device) for folder in folders() for reader in READERS for device in DEVICES}
    assert [statement for statement in STATEMENTS if statement not in reached] == []


def test_a_refusal_says_what_to_do() -> None:
    for statement in STATEMENTS:
        assert statement.what
        assert statement.outcome.serves or statement.do, statement
        assert statement.reader in READERS


@pytest.mark.parametrize("run", load_runs(), ids=lambda run: f"{run.reader}-{run.device}-{run.layout}-{run.outcome}")
def test_what_a_server_did_is_what_the_table_says(run: ReaderRun) -> None:
    statement = judge(run.folder, run.reader, device_of(run.device))
    assert (statement.outcome.value, READERS[run.reader].version) == (run.outcome, run.version)
    assert statement.said in run.found
    assert run in confirming(statement)
    assert evidence(statement).startswith("run")


@pytest.mark.parametrize(
    ("activations", "experts", "device", "reader", "outcome"),
    [
        ("per-token", False, "a100", "vllm", Outcome.AS_WRITTEN),
        ("per-tensor", False, "h100", "vllm", Outcome.AS_WRITTEN),
        ("per-tensor", False, "cpu-amx", "vllm", Outcome.OTHERWISE),
        ("per-token", False, "b200", "vllm", Outcome.REFUSED),
        ("per-token", True, "a100", "vllm", Outcome.AS_WRITTEN),
        ("per-token", True, "a100", "sglang", Outcome.REFUSED),
        ("per-tensor", False, "a100", "sglang", Outcome.REFUSED),
        ("per-token", False, "h100", "pytorch", Outcome.WRONG),
        ("per-tensor", False, "h100", "pytorch", Outcome.REFUSED),
        ("per-token", False, "h100", "engines", Outcome.REFUSED),
    ],
)
def test_known_answers(activations: str, experts: bool, device: str, reader: str, outcome: Outcome) -> None:
    folder = FolderFacts("compressed-tensors", "mixtral" if experts else "llama", activations, experts)
    assert judge(folder, reader, device_of(device)).outcome is outcome


@pytest.mark.parametrize(
    ("model", "window", "device", "outcome"),
    [
        ("llama", False, "a100", Outcome.AS_WRITTEN),
        ("qwen3", False, "orin", Outcome.AS_WRITTEN),
        ("phi3", False, "b200", Outcome.AS_WRITTEN),
        ("llama", False, "t4", Outcome.REFUSED),
        ("llama", False, "h100", Outcome.UNKNOWN),
        ("mistral", True, "a100", Outcome.WRONG),
        ("gemma3_text", True, "a100", Outcome.WRONG),
        ("falcon", False, "a100", Outcome.WRONG),
        ("mixtral", False, "a100", Outcome.REFUSED),
    ],
)
def test_edge_llm(model: str, window: bool, device: str, outcome: Outcome) -> None:
    folder = FolderFacts("modelopt", model, "per-tensor", experts=model == "mixtral", window=window)
    assert judge(folder, "edge-llm", device_of(device)).outcome is outcome
    if outcome is Outcome.WRONG:
        with pytest.raises(UserError, match=f"no server takes a modelopt folder of {model}"):
            check_served(folder)


@pytest.mark.parametrize(
    ("changes", "window"),
    [
        ({}, False),
        ({"sliding_window": 128}, True),
        ({"sliding_window": None}, False),
        ({"sliding_window": 128, "use_sliding_window": False}, False),
        ({"sliding_window": 4096}, False),
    ],
)
def test_windows_by_the_config(changes: dict, window: bool) -> None:
    config = {"max_position_embeddings": 4096} | changes
    assert facts_of("modelopt", PER_TOKEN, config).window is window


def test_devices_of_one_mind_stand_together() -> None:
    found = opinions(FolderFacts("compressed-tensors", "llama", "per-token"), "vllm")
    assert [opinion.where for opinion in found] == ["t4, a100, l4, h100", "b200, rtx5090", "cpu, cpu-amx"]


def test_a_form_that_a_reader_does_not_know_is_refused() -> None:
    statement = judge(FolderFacts("ONNX", "llama", "per-token"), "vllm", device_of("a100"))
    assert (statement.outcome, statement.do) == (Outcome.REFUSED, "smoothquant export w8a8")
    assert "it takes compressed-tensors and float, and no ONNX" in statement.what


@pytest.mark.parametrize(
    ("model", "experts", "said"), [("bloom", False, "query_key_value"), ("mixtral", True, "one scale per token only")]
)
def test_what_no_server_takes_is_refused(model: str, experts: bool, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        check_served(FolderFacts("compressed-tensors", model, "per-tensor", experts))
    assert caught.value.do == "export with --act per-token"
    check_served(FolderFacts("compressed-tensors", model, "per-token", experts))


def test_a_model_that_a_reader_has_no_class_for_is_not_known() -> None:
    for model in ("falcon", "mine"):
        assert judge(FolderFacts("compressed-tensors", model, "per-token"), "sglang", device_of("a100")).outcome is (
            Outcome.UNKNOWN
        )


def test_a_folder_in_short() -> None:
    told = in_short(FolderFacts("compressed-tensors", "llama", "per-token"))
    assert told.startswith("computed as written on A100 and H100 by vLLM 0.32.0, SGLang 0.5.23; not by TensorRT-LLM")
    assert "FP8" in told
    told = in_short(FolderFacts("modelopt", "llama", "per-tensor"))
    assert told == "computed as written on A100 by TensorRT Edge-LLM 0.11.0"


@pytest.mark.parametrize(
    ("name", "capability"), [("A100", 80), ("RTX PRO 6000", 120), ("8.6", 86), ("12.0", 120), ("cpu", None)]
)
def test_a_device_by_its_name(name: str, capability: int | None) -> None:
    assert device_of(name).capability == capability


@pytest.mark.parametrize("name", ["", "a101", "86", "8.65", "-8.6", "cpu-avx"])
def test_an_unknown_device_is_refused(name: str) -> None:
    with pytest.raises(UserError, match="--gpu"):
        device_of(name)


@pytest.mark.parametrize(
    ("hardware", "words"),
    [
        (Hardware((75, 90)), "GPUs of 7.5 to 9.0"),
        (Hardware((100, 999)), "GPUs of 10.0 and later"),
        (Hardware((0, 74)), "GPUs up to 7.4"),
        (Hardware((0, 999), cpu=True, amx=True), "any GPU, CPU"),
        (Hardware(cpu=True), "CPU without AMX"),
        (Hardware(amx=True), "CPU with AMX"),
    ],
)
def test_hardware_in_words(hardware: Hardware, words: str) -> None:
    assert str(hardware) == words


@pytest.mark.parametrize(
    ("config", "experts"), [({"num_local_experts": 8}, True), ({"num_experts": 0}, False), ({}, False)]
)
def test_experts_by_the_config(config: dict, experts: bool) -> None:
    assert facts_of("float", PER_TOKEN, config).experts is experts
