"""Checkpoints, configs, scales and family records that contradict one another: one line that names what is wrong."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from act_scales.collect import collect
from act_scales.store import ActScales
from act_scales.text import Text
from recipes import llama, mixtral
from recipes.families import load_family, open_model
from smoothquant.checkpoint import Checkpoint
from smoothquant.contract import Contract
from smoothquant.errors import ActScalesError, CheckpointError, ContractError, UserError
from smoothquant.family import SmoothingGroup
from smoothquant.model import Model
from smoothquant.roles import ROUTER
from smoothquant.settings import SmoothingSettings
from smoothquant.stream import quantize_layer, smooth_layer
from tests import zoo
from tests.forked import smoothquant

Spoil = Callable[[Path], None]
EXPERT = "model.layers.1.block_sparse_moe.experts"


def configure(**changes: object) -> Spoil:
    def spoil(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps(config))

    return spoil


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Spoil:
    def spoil(folder: Path) -> None:
        found = load_file(folder / "model.safetensors")
        change(found)
        save_file(found, folder / "model.safetensors", {"format": "pt"})

    return spoil


def untie(found: dict[str, torch.Tensor]) -> None:
    found["lm_head.weight"] = found["model.embed_tokens.weight"] + 1


def untie_a_row(found: dict[str, torch.Tensor]) -> None:
    found["lm_head.weight"] = found["model.embed_tokens.weight"].clone()
    found["lm_head.weight"][200] += 1


SPOILED = {
    "an expert is missing": (
        "mixtral",
        tensors(lambda found: found.pop(f"{EXPERT}.3.w2.weight")),
        rf"tensor {EXPERT}\.3\.w2\.weight is missing; expected shape \[64, 128\]",
    ),
    "an expert too many": (
        "mixtral",
        tensors(lambda found: found.update({f"{EXPERT}.4.w1.weight": found[f"{EXPERT}.3.w1.weight"].clone()})),
        rf"tensor {EXPERT}\.4\.w1\.weight is not part of a mixtral",
    ),
    "fewer experts by config": ("mixtral", configure(num_local_experts=3), r"experts\.3\.\S+ is not part|gate\.weight"),
    "more experts by config": (
        "mixtral",
        configure(num_local_experts=5),
        r"gate\.weight has shape \[4, 64\]; expected",
    ),
    "more chosen than there are": ("mixtral", configure(num_experts_per_tok=5), "5 experts per token of 4; expected"),
    "a head that is not tied": ("llama-tied", tensors(untie), r"lm_head\.weight is not model\.embed_tokens\.weight"),
    "a head of which a row is not tied": ("llama-tied", tensors(untie_a_row), r"lm_head\.weight is not model\."),
    "Falcon's layout by config": (
        "falcon-40b",
        configure(num_ln_in_parallel_attn=1),
        r"transformer\.h\.0\.input_layernorm\.weight is missing",
    ),
    "Falcon's heads by config": (
        "falcon-40b",
        configure(num_kv_heads=4),
        r"query_key_value\.weight has shape \[128, 64\]; expected \[192, 64\]",
    ),
    "OPT without its projections": ("opt-350m", configure(word_embed_proj_dim=64), r"embed_tokens\.weight has shape"),
    "OPT without norm weights": (
        "opt",
        configure(layer_norm_elementwise_affine=False),
        "layer_norm_elementwise_affine",
    ),
    "BLOOM whose norms feed the residual": (
        "bloom",
        configure(apply_residual_connection_post_layernorm=True),
        "the norms feed the residual, too; expected false",
    ),
    "RoPE that changes with the length": (
        "llama",
        configure(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
        "'dynamic' changes its frequencies with every token",
    ),
    "experts in some layers only": (
        "qwen3-moe-unnormed",
        configure(decoder_sparse_step=2),
        "decoder_sparse_step is 2: some layers have experts",
    ),
    "a dense MLP in some layers": (
        "qwen3-moe-unnormed",
        configure(mlp_only_layers=[1]),
        r"mlp_only_layers is \[1\]: some layers have experts",
    ),
    "a Gemma that sees what comes": (
        "gemma3",
        configure(use_bidirectional_attention=True),
        "use_bidirectional_attention",
    ),
    "Qwen3 without its norms": (
        "qwen3",
        tensors(lambda found: found.pop("model.layers.0.self_attn.q_norm.weight")),
        r"q_norm\.weight is missing; expected shape \[24\]",
    ),
}


@pytest.mark.parametrize("fault", SPOILED)
def test_config_and_weights_that_contradict(fault: str, tmp_path: Path) -> None:
    layout, spoil, message = SPOILED[fault]
    spoil(zoo.save(layout, tmp_path))
    with pytest.raises(CheckpointError, match=message) as caught:
        open_model(tmp_path)
    assert "\n" not in str(caught.value)


# -- scales ----------------------------------------------------------------------------------------------------------


def made_up_scales(model: Model) -> dict[str, torch.Tensor]:
    return {name: torch.rand(columns) + 0.5 for name, (_, columns) in model.linears()}


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        ("mixtral", f"{EXPERT}.2.w3"),
        ("bloom", "transformer.h.1.self_attention.query_key_value"),
        ("phi3", "model.layers.0.mlp.gate_up_proj"),
    ],
)
def test_scales_lack_a_linear_or_have_one_too_many(layout: str, name: str, tmp_path: Path) -> None:
    model = open_model(zoo.save(layout, tmp_path))
    scales = made_up_scales(model)
    ActScales(scales).for_model(model)
    lacking = {key: value for key, value in scales.items() if key != name}
    with pytest.raises(ActScalesError, match=rf"no activation scales for {name}"):
        ActScales(lacking).for_model(model)
    with pytest.raises(ActScalesError, match=rf"activation scales for {name}x, which this model does not have"):
        ActScales(scales | {f"{name}x": scales[name]}).for_model(model)


def test_scales_of_routers_are_dropped(tmp_path: Path) -> None:
    """The published ones of Mixtral have them; the norm's range is the experts' together."""
    model = open_model(zoo.save("mixtral", tmp_path))
    scales = made_up_scales(model)
    routers = {model.linear(layer, ROUTER): torch.ones(64) for layer in range(2)}
    assert ActScales(scales | routers).for_model(model).input_absmax.keys() == scales.keys()


# -- experts that calibration does not reach ---------------------------------------------------------------------------


def test_a_silent_expert_is_named_and_borrows_its_range(tmp_path: Path) -> None:
    folder = zoo.save("mixtral", tmp_path / "model")
    model = open_model(folder)
    same = Text((torch.full((40,), 5),), "one token, again and again: one pair of experts in each layer")
    scales = collect(model, same, tmp_path / "s.safetensors", dtype="float32")
    silent = [name for name in scales.silent if name.startswith(EXPERT)]
    assert len(silent) == 2
    expert = silent[0].rpartition(".")[2]
    layer = smooth_layer(model, 1, scales.input_absmax, SmoothingSettings(0.5))
    assert f"down.{expert}" in layer.column
    assert (layer.column[f"down.{expert}"] == 1).all()  # nothing is known of its channels
    others = [layer.input_absmax[f"down.{n}"].max() for n in range(4) if f"{EXPERT}.{n}" not in silent]
    assert layer.input_absmax[f"down.{expert}"].max() == max(others)
    linears = quantize_layer(layer).linears
    assert linears[f"down.{expert}"].input_scale == max(linears[f"down.{n}"].input_scale for n in range(4))

    text = tmp_path / "text.txt"
    text.write_text("a" * 40)
    few = ("--text", text, "--samples", 1, "--length", 32)
    done = smoothquant("calibrate", folder, *few, "--out", tmp_path / "one.safetensors", "--quiet")
    assert done.returncode == 0, done.stderr
    assert "warning: no token of the calibration reached" in done.stderr
    assert f"{EXPERT}." in done.stderr


# -- family records ----------------------------------------------------------------------------------------------------


def test_an_unknown_architecture_lists_the_known_and_shows_the_way(tmp_path: Path) -> None:
    configure(architectures=["MineForCausalLM"], model_type="mine")(zoo.save("llama", tmp_path))
    with pytest.raises(UserError, match=r"architecture MineForCausalLM \(model_type 'mine'\) is not known") as caught:
        open_model(tmp_path)
    for known in ("LlamaForCausalLM", "MixtralForCausalLM", "FalconForCausalLM", "OPTForCausalLM", "BloomForCausalLM"):
        assert known in str(caught.value)
    assert "--family FILE" in str(caught.value)


def test_experts_that_a_record_forgets_are_caught(tmp_path: Path) -> None:
    """A record by which the norm feeds the router and gate alone: up is not compensated, layer 0 differs."""
    folder = zoo.save("mixtral", tmp_path)
    groups = tuple(
        SmoothingGroup("mlp", (ROUTER, "gate")) if group.source == "mlp" else group for group in mixtral.FAMILY.groups
    )
    model = Model(Checkpoint(folder), replace(mixtral.FAMILY, groups=groups))
    with pytest.raises(ContractError, match="changed the output of layer 0"):
        Contract(model).check(smooth_layer(model, 0, made_up_scales(model), SmoothingSettings(0.5)))


def test_two_scales_on_falcons_one_norm_are_caught(tmp_path: Path) -> None:
    """As a tool did that folded q, k, v and the MLP into the norm one after the other."""
    folder = zoo.save("falcon-7b", tmp_path)
    model = open_model(folder)
    groups = (SmoothingGroup("attention", ("q", "k", "v")), SmoothingGroup("attention", ("up",)))
    wrong = Model(Checkpoint(folder), replace(model.family, groups=groups))
    with pytest.raises(ContractError, match="changed the output of layer 0"):
        Contract(wrong).check(smooth_layer(wrong, 0, made_up_scales(wrong), SmoothingSettings(0.5)))


def test_folding_through_gelu_is_caught(tmp_path: Path) -> None:
    folder = zoo.save("bloom", tmp_path)
    model = open_model(folder)
    groups = (*model.family.groups, SmoothingGroup("up", ("down",), through="product"))
    wrong = Model(Checkpoint(folder), replace(model.family, groups=groups))
    with pytest.raises(ContractError, match="changed the output of layer 0"):
        Contract(wrong).check(smooth_layer(wrong, 0, made_up_scales(wrong), SmoothingSettings(0.5)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ('layer="model.blocks.{}"', r"tensor model\.blocks\.0\.\S+ is missing"),
        ('linears={**LLAMA.linears, "up": "mlp.other_proj"}', r"mlp\.other_proj\.weight is missing"),
        ('norms={"attention": "input_layernorm"}', "a group's source 'mlp'; expected one of attention"),
        (
            'groups=(LLAMA.groups[0], replace(LLAMA.groups[1], linears=("gate", "op")))',
            "a group's linear 'op'; expected",
        ),
        ('groups=(replace(LLAMA.groups[0], source="mpl"),)', "a group's source 'mpl'; expected one of attention, mlp"),
        ('groups=(replace(LLAMA.groups[0], through="gelu"),)', "a group's through 'gelu'; expected one of norm"),
        ('norm="batch"', "norm 'batch'; expected one of rms"),
        ('norm="layer"', r"input_layernorm\.bias is missing"),
    ],
)
def test_a_family_file_that_does_not_describe_the_checkpoint(change: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from dataclasses import replace\nfrom recipes.llama import FAMILY as LLAMA\n"
        f'FAMILY = replace(LLAMA, name="mine", {change})\n'
    )
    folder = zoo.save("llama", tmp_path / "model")
    with pytest.raises(CheckpointError, match=message):
        open_model(folder, file)


@pytest.mark.parametrize(
    ("text", "message"),
    [("FAMILY = 3", "no FAMILY in it"), ("FAMILY = ", r"cannot be run \(SyntaxError"), ("1 / 0", "ZeroDivisionError")],
)
def test_a_family_file_that_is_none(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(text)
    with pytest.raises(UserError, match=message):
        load_family(file)
    with pytest.raises(UserError, match="no such family file"):
        load_family(tmp_path / "none.py")


def test_the_worked_example_of_the_documentation(tmp_path: Path) -> None:
    """recipes/README.md's own family file, from its text, on a checkpoint with its names."""
    readme = (Path(llama.__file__).parent / "README.md").read_text()
    example = readme.split("```python\n# my_family.py")[1].split("```")[0]
    file = tmp_path / "my_family.py"
    file.write_text("# my_family.py" + example)
    folder = zoo.save("llama", tmp_path / "model")
    tensors(
        lambda found: [
            found.update({name.replace("model.layers.", "model.blocks."): found.pop(name)}) for name in list(found)
        ]
    )(folder)
    configure(architectures=["MineForCausalLM"], model_type="mine")(folder)
    with pytest.raises(UserError, match="transformers knows neither MineForCausalLM nor model_type 'mine'"):
        open_model(folder, file)
    assert open_model(folder, file, trust_family=True).family.name == "mine"
