"""A family is compared with transformers: what agrees, what does not, and that every key that a record reads counts."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging import version
from transformers import GraniteConfig, GraniteForCausalLM

from recipes import falcon, llama, qwen
from recipes.families import FAMILIES, open_model
from recipes.trust import agreement, keys
from recipes.trust.known import transformers_class
from smoothquant.config import Config
from smoothquant.errors import CheckpointError, UserError
from smoothquant.family import Family, Geometry
from tests import zoo
from tests.models import save_llama, save_tokenizer
from tests.zoo import COMMON, LLAMA3, ZOO
from tests.zoo.hub_configs import CONFIGS

BY_TYPE = {kind: family for family in FAMILIES for kind in family.model_types}
BOUNDS = {"max_position_embeddings", "seq_length", "original_max_position_embeddings"}  # lengths, not arithmetic
OTHER = {
    "silu": "relu",
    "gelu": "relu",
    "gelu_pytorch_tanh": "relu",
    "relu": "gelu",
    "full_attention": "sliding_attention",
    "sliding_attention": "full_attention",
    "linear": "default",
    "llama3": "default",
    "yarn": "default",
    "longrope": "default",
    "default": "linear",
}


def layout_config(name: str) -> dict[str, Any]:
    layout = ZOO[name]
    config = layout.model.config_class(**(COMMON | dict(layout.numbers)), architectures=[layout.model.__name__])
    return json.loads(config.to_json_string(use_diff=False))


ALL = {**CONFIGS, **{f"layout {name}": layout_config(name) for name in ZOO}}


def read_by(content: Mapping, family: Family) -> tuple[Config, Geometry]:
    config = Config(content)
    record = family.variant(config) if family.variant else family
    return config, record.geometry(config)


def cut(content: Mapping, family: Family) -> dict[str, Any]:
    config, geometry = read_by(content, family)
    theirs = transformers_class(content)
    assert theirs is not None
    keys.check_keys(config, family, theirs)
    return agreement.cut_down(content, geometry, theirs.read(content))


@pytest.mark.parametrize("name", ALL)
def test_a_key_that_is_read_counts(name: str, tmp_path: Path) -> None:
    """transformers agrees on this config; with another value of a key, ours differ, or else theirs do not either."""
    content = ALL[name]
    family = BY_TYPE[content["model_type"]]
    small, theirs = cut(content, family), transformers_class(content)
    assert theirs is not None
    expected = agreement.save_theirs(small, theirs, tmp_path)
    assert agreement.disagreement(agreement.our_logits(tmp_path, small, family), expected) <= agreement.TOLERANCE / 5

    def differs(changed: Mapping) -> bool:
        try:
            found = agreement.our_logits(tmp_path, changed, family)
        except (UserError, RuntimeError):  # the weights have another shape then
            return True
        return not agreement.disagreement(found, expected) <= agreement.TOLERANCE

    changes = list(other_values(small, read_by(small, family)[0]))
    assert len(changes) >= 5
    for path, changed in changes:
        if path[-1] in BOUNDS or differs(changed):
            continue
        try:
            their_own = agreement.save_theirs(changed, theirs, tmp_path / "changed")
        except CheckpointError:  # transformers refuses it, and so do we
            continue
        assert agreement.disagreement(their_own, expected) <= agreement.TOLERANCE, path


def other_values(content: Mapping, config: Config):
    """The config with another value of each key that was read."""
    for path in sorted(config.read):
        changed = copy.deepcopy(dict(content))
        place: Any = changed
        for key in path[:-1]:
            place = place.get(key) if isinstance(place, dict) else None
        if not isinstance(place, dict) or place.get(path[-1]) is None or isinstance(place[path[-1]], dict):
            continue
        place[path[-1]] = other_value(place[path[-1]])
        yield path, changed


def other_value(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    if isinstance(value, int | float):
        return value * 2
    if isinstance(value, list):
        return [other_value(one) for one in value]
    return OTHER[value]


# -- wrong records -----------------------------------------------------------------------------------------------------

MULTIPLIERS = {
    "embedding_multiplier": 12.0,
    "attention_multiplier": 0.0625,
    "residual_multiplier": 0.22,
    "logits_scaling": 8.0,
}


@pytest.fixture(scope="module")
def granite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("granite")
    numbers = COMMON | {"intermediate_size": 128, "num_key_value_heads": 2, "tie_word_embeddings": False}
    torch.manual_seed(0)
    GraniteForCausalLM(GraniteConfig(**numbers, **MULTIPLIERS)).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def record(tmp_path: Path, change: str) -> Path:
    file = tmp_path / "mine.py"
    file.write_text(
        "from dataclasses import replace\nfrom recipes.llama import FAMILY as LLAMA\n"
        f"FAMILY = replace(LLAMA, name='mine', {change})\n"
    )
    return file


def test_a_granite_is_no_llama(granite: Path, tmp_path: Path) -> None:
    """Its multipliers are named one by one; a record that waves them through computes something else."""
    architecture = "architectures=('GraniteForCausalLM',)"
    with pytest.raises(CheckpointError, match=r"(multiplier|scaling) is [0-9.]+, and the family mine does not read it"):
        open_model(granite, record(tmp_path, architecture))
    waved = record(tmp_path, f"{architecture}, ignored_keys={tuple(MULTIPLIERS)}")
    with pytest.raises(CheckpointError, match=r"something else than transformers' GraniteForCausalLM.*of their spread"):
        open_model(granite, waved)
    with pytest.raises(CheckpointError, match="something else"):  # trust is for what nobody can check
        open_model(granite, waved, trust_family=True)


UNREAD = r"rope_parameters is \{.*does not read it"


@pytest.mark.parametrize(
    ("layout", "change", "message"),
    [
        ("qwen3", "", "does not fit what transformers' Qwen3ForCausalLM saves|is not part of|does not read it"),
        ("llama", "geometry=lambda config: replace(LLAMA.geometry(config), norm_epsilon=1e-5)", "something else"),
        ("llama", "geometry=lambda config: replace(LLAMA.geometry(config), activation='gelu')", "something else"),
        ("llama-scaled", "geometry=lambda config: LLAMA.geometry(config.replacing({'rope_parameters': None}))", UNREAD),
        ("llama", "geometry=lambda config: LLAMA.geometry({**config})", "reads all keys of config.json at once"),
        ("llama-scaled", "parallel=True", "something else"),
    ],
)
def test_a_wrong_record_is_refused(layout: str, change: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message):
        open_model(zoo.save(layout, tmp_path / "model"), record(tmp_path, change))


def test_a_window_that_is_not_read_shows() -> None:
    """A record that reads the key and forgets the window."""
    content = ALL["layout mistral"]

    def forgetful(config: Config) -> Geometry:
        config.get("sliding_window")
        return llama.geometry(config)

    family = replace(BY_TYPE["mistral"], geometry=forgetful)
    with pytest.raises(AssertionError):
        assert_agrees(content, family)


def assert_agrees(content: Mapping, family: Family) -> None:
    import tempfile

    small, theirs = cut(content, family), transformers_class(content)
    assert theirs is not None
    with tempfile.TemporaryDirectory() as folder:
        expected = agreement.save_theirs(small, theirs, Path(folder))
        assert agreement.disagreement(agreement.our_logits(Path(folder), small, family), expected) <= 1e-4


# -- names -------------------------------------------------------------------------------------------------------------


def configured(folder: Path, **changes: object) -> Path:
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value != "absent"}))
    return folder


@pytest.mark.parametrize(
    ("kind", "architectures", "message"),
    [
        ("llama", ["MistralForCausalLM"], "MistralForCausalLM is of model type mistral, and model_type is llama"),
        ("mistral", ["LlamaForCausalLM"], "LlamaForCausalLM is of model type llama, and model_type is mistral"),
        ("granite", ["LlamaForCausalLM"], "of model type llama, and model_type is granite"),
        ("llama", ["StableLmForCausalLM"], "of model type stablelm, and model_type is llama"),
        ("llama", "LlamaForCausalLM", 'architectures is "LlamaForCausalLM"; expected a list, each of it a name'),
        ("llama", [["LlamaForCausalLM"]], "architectures is .*; expected a list, each of it a name"),
        (7, ["LlamaForCausalLM"], "model_type is 7; expected a name"),
        (["llama"], ["LlamaForCausalLM"], r'model_type is \["llama"\]; expected a name'),
    ],
)
def test_names_that_contradict(kind: object, architectures: object, message: str, tmp_path: Path) -> None:
    configured(save_llama(tmp_path), model_type=kind, architectures=architectures)
    with pytest.raises(CheckpointError, match=message):
        open_model(tmp_path)


def test_names_of_another_type_with_a_record_of_ones_own(tmp_path: Path) -> None:
    configured(save_llama(tmp_path / "model"), model_type=["llama"])
    with pytest.raises(CheckpointError, match=r"model_type is .*; expected a name"):
        open_model(tmp_path / "model", record(tmp_path, ""))


@pytest.mark.parametrize(
    ("kind", "architectures"),
    [("llama", ["LLaMAForCausalLM"]), ("llama", ["LlamaModel"]), ("llama", "absent"), ("absent", ["LlamaForCausalLM"])],
)
def test_an_unknown_name_beside_a_known_one(kind: str, architectures: object, tmp_path: Path) -> None:
    configured(save_llama(tmp_path), model_type=kind, architectures=architectures)
    assert open_model(tmp_path).family.name == "llama"


def test_code_beside_the_weights_is_not_run(tmp_path: Path) -> None:
    folder = configured(save_llama(tmp_path), model_type="mine", auto_map={"AutoConfig": "code.MineConfig"})
    (folder / "code.py").write_text("raise SystemExit('ran')")
    with pytest.raises(UserError, match=r"transformers knows neither .* pass --trust-family"):
        open_model(folder)
    assert open_model(folder, trust_family=True).family.name == "llama"


# -- keys --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "changes"),
    [
        ("llama", {"unsloth_version": "2024.9", "transformers.js_config": {"dtype": "q4"}, "is_llama_config": True}),
        ("llama", {"rope_interleaved": False, "sliding_window_size": 4096, "eos_token_id": [1, 2], "max_length": 9}),
        ("llama", {"partial_rotary_factor": 1.0, "sliding_window": None, "alibi": False, "residual_multiplier": 1}),
        ("bloom", {"offset_alibi": 100, "n_inner": None, "bias_dropout_fusion": True, "slow_but_exact": False}),
        ("gemma2", {"hidden_act": "silu", "sliding_window_size": 4096, "cache_implementation": "hybrid"}),
    ],
)
def test_keys_that_change_nothing_are_passed_over(layout: str, changes: dict, tmp_path: Path) -> None:
    open_model(configured(zoo.save(layout, tmp_path), **changes))


@pytest.mark.parametrize(
    ("layout", "changes", "message"),
    [
        (
            "llama",
            {"partial_rotary_factor": 0.5},
            r"partial_rotary_factor is 0\.5, and the family llama does not read it",
        ),
        ("llama", {"rope_theta": 500000.0}, r"rope_theta is 10000\.0 and 500000\.0"),
        ("llama", {"sliding_window": 4096}, "sliding_window is 4096"),
        ("llama", {"residual_multiplier": 0.22}, r"residual_multiplier is 0\.22"),
        ("llama", {"alibi": True}, "alibi is True"),
        (
            "llama-scaled",
            {"rope_parameters": ZOO["llama-scaled"].numbers["rope_parameters"] | {"extra": 3}},
            "extra is 3",
        ),
        ("phi3", {"sliding_window": 0}, "sliding_window is 0; expected a whole number from 1"),
        ("llama", {"rms_norm_eps": float("inf")}, "rms_norm_eps is Infinity; expected a number from 0 to 1"),
        ("llama", {"rms_norm_eps": float("nan")}, "rms_norm_eps is NaN; expected a number"),
        ("llama", {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000; expected a whole number from 1 to"),
        ("llama", {"num_hidden_layers": 2**40}, "num_hidden_layers is 1099511627776; expected a whole number from 1"),
        ("llama", {"vocab_size": 2**40}, "vocab_size is 1099511627776; expected a whole number from 1"),
        ("mistral", {"sliding_window": 0}, "sliding_window is 0; expected a whole number from 1"),
        ("llama", {"rope_theta": 0, "rope_parameters": None}, "rope_theta is 0; expected a number above 0"),
        ("llama", {"hidden_size": "64"}, 'hidden_size is "64"; expected a whole number'),
        ("llama", {"num_attention_heads": None}, "num_attention_heads is null; expected a whole number"),
        ("llama", {"num_attention_heads": True}, "num_attention_heads is true; expected a whole number"),
        ("llama", {"hidden_act": ["silu"]}, r'hidden_act is \["silu"\]; expected a name'),
        (
            "llama",
            {"rope_parameters": {"rope_theta": 0}},
            r"rope_parameters\.rope_theta is 0; expected a number above 0",
        ),
        ("llama", {"layer_types": ["sliding_attention"] * 2}, "layer_types"),
        ("mistral", {"layer_types": ["full_attention"] * 2}, "layer_types"),
        ("llama", {"pad_token_id": 288}, "cannot run with this config.json .*[Pp]adding"),
        (
            "llama-scaled",
            {"rope_parameters": LLAMA3 | {"low_freq_factor": 9.0}},
            "low_freq_factor is 9.0 and high_freq",
        ),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ],
)
def test_keys_that_may_change_something_are_named(layout: str, changes: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        open_model(configured(zoo.save(layout, tmp_path), **changes))
    assert "\n" not in str(caught.value)


LINEAR = {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize(
    "layout",
    ["llama", "llama-scaled", "mistral", "mixtral", "qwen2", "qwen3", "gemma2", "granite", "olmo2", "falcon-7b"],
)
def test_the_older_spelling_of_rope_goes_before_the_newer(layout: str, tmp_path: Path) -> None:
    """As in transformers, with which an opened model agrees."""
    content = json.loads((zoo.save(layout, tmp_path) / "config.json").read_text())
    assert content["rope_parameters"]
    rope = open_model(configured(tmp_path, rope_scaling=LINEAR)).geometry.attention[0].inv_freq
    theta, rotated = content["rope_parameters"]["rope_theta"], 2 * len(rope)
    theta = theta or {"mixtral": 1e6}.get(layout, 1e4)
    assert rope == pytest.approx([theta ** (-2 * n / rotated) / 2 for n in range(len(rope))], rel=1e-6)


def test_both_spellings_of_a_gemma3(tmp_path: Path) -> None:
    """rope_scaling changes the layers without a window, one key after the other."""
    before = open_model(zoo.save("gemma3", tmp_path)).geometry.attention
    after = open_model(configured(tmp_path, rope_scaling={"type": "linear", "factor": 2.0})).geometry.attention
    for old, new in zip(before, after, strict=True):  # factor 8 before, and in windowed layers none
        assert new.inv_freq == (old.inv_freq if old.window else tuple(value * 4 for value in old.inv_freq))
    old_style = configured(
        tmp_path, rope_parameters=None, rope_theta=5e5, rope_local_base_freq=3e3, rope_scaling=LINEAR
    )
    for rope in open_model(old_style).geometry.attention:
        theta, factor = (3e3, 1) if rope.window else (5e5, 2)
        assert rope.inv_freq[1] == pytest.approx(theta ** (-1 / len(rope.inv_freq)) / factor, rel=1e-6)


@pytest.mark.parametrize(
    ("layout", "scaling", "key", "value"),
    [("llama", LINEAR, "rope_theta", 5e5), ("phi3-partial", {"rope_type": "default"}, "partial_rotary_factor", 0.5)],
)
def test_what_the_older_spelling_would_lose_is_named(
    layout: str, scaling: dict, key: str, value: float, tmp_path: Path
) -> None:
    """transformers computes with the default then, without a word."""
    folder = configured(zoo.save(layout, tmp_path), rope_parameters={"rope_type": "default", key: value})
    open_model(folder)
    with pytest.raises(CheckpointError, match=f"rope_scaling goes before rope_parameters, whose {key} {value} is lost"):
        open_model(configured(folder, rope_scaling=scaling))
    open_model(configured(folder, rope_scaling=scaling | {key: value}))


def test_a_mistral_with_layer_types_is_what_transformers_takes_it_for(tmp_path: Path) -> None:
    """A Ministral, even if they are null, and that one needs a head_dim."""
    folder = configured(zoo.save("mistral", tmp_path), layer_types=None, head_dim=16)
    open_model(folder)
    with pytest.raises(CheckpointError, match="MinistralForCausalLM cannot run with this config"):
        open_model(configured(folder, head_dim="absent"))


def test_llama3_without_its_original_length_is_as_in_transformers(tmp_path: Path) -> None:
    """transformers 5 takes max_position_embeddings; an earlier one refuses, and so do we then."""
    rope = {key: value for key, value in LLAMA3.items() if key != "original_max_position_embeddings"}
    folder = configured(zoo.save("llama-scaled", tmp_path), rope_parameters=rope, max_position_embeddings=64)
    whole = configured(zoo.save("llama-scaled", tmp_path / "whole"), max_position_embeddings=64)
    if version.parse(transformers.__version__) >= version.parse("5"):
        assert open_model(folder).geometry == open_model(whole).geometry
    else:
        with pytest.raises(CheckpointError, match="cannot run with this config"):
            open_model(folder)


def test_both_spellings_of_a_falcon_are_one(tmp_path: Path) -> None:
    """A config of the first releases is compared under today's names."""
    old = {"model_type": "RefinedWeb", "n_head": 8, "n_layer": 2, "n_head_kv": 2, "n_embed": 64, "vocab_size": 288}
    new = falcon.modern(old)
    assert new["model_type"] == "falcon"
    assert new["new_decoder_architecture"] is True
    assert_agrees(new | {"bias": False, "alibi": False}, falcon.FAMILY)


# -- verdicts ----------------------------------------------------------------------------------------------------------


def test_a_verdict_is_remembered_by_all_that_it_depends_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    ask = agreement.check_agreement
    monkeypatch.setattr(agreement, "check_agreement", lambda *given: (asked.append("asked"), ask(*given)))
    monkeypatch.setenv("SMOOTHQUANT_CACHE", str(tmp_path / "cache"))
    folder = save_llama(tmp_path / "model")
    open_model(folder)
    open_model(folder)
    assert len(asked) == 1
    (kept,) = (tmp_path / "cache" / "families").iterdir()
    assert json.loads(kept.read_text())["family"] == "llama"
    configured(folder, rms_norm_eps=1e-5)  # another config
    open_model(folder)
    assert len(asked) == 2
    file = record(tmp_path, "")  # another record of the same function
    open_model(folder, file)
    open_model(folder, file)
    assert len(asked) == 3
    kept.write_text("{")  # a spoiled one is none
    configured(folder, rms_norm_eps=1e-6)
    open_model(folder)
    assert len(asked) == 4


def test_a_home_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SMOOTHQUANT_CACHE", str(tmp_path / "file"))  # no folder can be made there
    folder = save_llama(tmp_path / "model")
    assert open_model(folder).family.name == open_model(folder).family.name == "llama"


def test_qwen_reads_both_of_its_spellings_of_windows() -> None:
    content = ALL["layout qwen2-sliding"]
    config, _ = read_by(content, qwen.QWEN2)
    assert {("layer_types",), ("max_window_layers",)} <= config.read
