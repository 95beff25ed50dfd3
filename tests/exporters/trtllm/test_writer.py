"""The files as a whole: config.json of every family, what an interruption leaves, what the manifest tells."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from act_scales.text import Text
from builders.tensorrt_llm.format.check import check
from builders.tensorrt_llm.format.findings import errors
from builders.tensorrt_llm.interpreter import engine as interpreter_engine
from builders.tensorrt_llm.interpreter.interpreter import EnginePrecision, Interpreter
from builders.validate import read_scheme, validate_engines
from exporters.export import Source, export
from exporters.huggingface import W8A8Writer
from exporters.trtllm import MODES, Mode, Ranks, TrtllmWriter
from exporters.trtllm.decoders import DECODERS
from recipes.cli import main
from recipes.families import open_model
from smoothquant import workroom
from smoothquant.artifacts.manifest import TrtllmOptions
from smoothquant.errors import ContractError
from smoothquant.outputs import load_manifest
from smoothquant.scheme import SHARED_CACHES, scheme_of
from smoothquant.settings import SmoothingSettings
from smoothquant.stream import quantize_layer, smoothed_layers
from tests.exporters.trtllm.checkpoints import NO_PLUGINS, PER_TOKEN, STATIC, make, ranks, settings, with_cache, write
from tests.models import open_llama, sample_ids
from tests.zoo import LLAMA3

ORIGINAL = "original_max_position_embeddings"

# The keys that the loader asks for, by the format's description (docs of config.json, not our code).
COMMON = {
    "architecture",
    "dtype",
    "logits_dtype",
    "vocab_size",
    "max_position_embeddings",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_size",
    "qk_layernorm",
    "hidden_act",
    "intermediate_size",
    "norm_epsilon",
    "position_embedding_type",
    "rotary_embedding_dim",
    "runtime_defaults",
    "use_parallel_embedding",
    "embedding_sharding_dim",
    "mapping",
    "quantization",
}
LLAMA = {
    "mlp_bias",
    "attn_bias",
    "rotary_base",
    "rotary_scaling",
    "residual_mlp",
    "disable_weight_only_quant_plugin",
    "remove_duplicated_kv_heads",
    "fc_after_embed",
    "use_input_layernorm_in_first_layer",
    "use_last_layernorm",
    "layer_idx_offset",
    "tie_word_embeddings",
}
QWEN2 = {
    "attn_bias",
    "mlp_bias",
    "qwen_type",
    "rotary_base",
    "rotary_scaling",
    "seq_length",
    "use_logn_attn",
    "num_labels",
    "moe_intermediate_size",
    "moe_shared_expert_intermediate_size",
    "disable_weight_only_quant_plugin",
    "tie_word_embeddings",
}
FALCON = {"bias", "parallel_attention", "num_ln_in_parallel_attn", "new_decoder_architecture", "rotary_base"}
QUANTIZATION = {
    "quant_algo",
    "kv_cache_quant_algo",
    "group_size",
    "smoothquant_val",
    "clamp_val",
    "use_meta_recipe",
    "has_zero_point",
    "pre_quant_scale",
    "exclude_modules",
}
FAMILIES: dict[str, tuple[set[str], dict[str, object]]] = {
    "llama": (LLAMA, {"architecture": "LlamaForCausalLM", "attn_bias": False, "rotary_scaling": None}),
    "llama-biased": (LLAMA, {"attn_bias": True, "mlp_bias": True}),
    "llama-tied": (LLAMA, {"tie_word_embeddings": True}),
    "mistral": (LLAMA, {"architecture": "MistralForCausalLM"}),
    "mistral-nemo": (LLAMA, {"head_size": 24, "rotary_embedding_dim": 24}),
    "phi3": (LLAMA, {"architecture": "LlamaForCausalLM"}),
    "qwen2": (QWEN2, {"architecture": "Qwen2ForCausalLM", "attn_bias": True, "qwen_type": "qwen2"}),
    "bloom": (
        set(),
        {"architecture": "BloomForCausalLM", "position_embedding_type": "alibi", "hidden_act": "gelu"},
    ),
    "falcon-7b": (
        FALCON,
        {
            "architecture": "FalconForCausalLM",
            "num_key_value_heads": 1,
            "parallel_attention": True,
            "new_decoder_architecture": False,
            "num_ln_in_parallel_attn": None,
        },
    ),
    "falcon-40b": (FALCON, {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 2, "hidden_act": "gelu"}),
    "falcon-11b": (FALCON, {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 1, "intermediate_size": 192}),
    "opt": (
        {"do_layer_norm_before"},
        {"architecture": "OPTForCausalLM", "position_embedding_type": "learned_absolute", "hidden_act": "relu"},
    ),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return make("llama", tmp_path_factory.mktemp("llama"), num_hidden_layers=4)


def config_of(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


@pytest.mark.parametrize("name", FAMILIES)
def test_config(name: str, tmp_path: Path) -> None:
    keys, values = FAMILIES[name]
    config = config_of(write(make(name, tmp_path), tmp_path / "out", STATIC, tp=2, kv="int8"))
    assert config.keys() == COMMON | keys
    assert {key: config[key] for key in values} == values
    assert config["quantization"].keys() == QUANTIZATION
    assert config["quantization"]["quant_algo"] == "W8A8_SQ_PER_CHANNEL_PER_TENSOR_PLUGIN"
    assert config["quantization"]["kv_cache_quant_algo"] == "INT8"
    assert config["mapping"] == {
        "world_size": 2,
        "gpus_per_node": 8,
        "cp_size": 1,
        "tp_size": 2,
        "pp_size": 1,
        "moe_tp_size": 2,
        "moe_ep_size": 1,
    }


def test_every_family_was_tried() -> None:
    assert {name.partition("-")[0] for name in FAMILIES} == DECODERS.keys()


def test_rope_scaling(tmp_path: Path) -> None:
    config = config_of(write(make("llama-scaled", tmp_path), tmp_path / "out"))
    assert config["rotary_base"] == 10000.0
    assert config["rotary_scaling"] == {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }


@pytest.mark.parametrize(
    ("changes", "base", "scaling"),
    [
        (  # what goes first for the model goes first for the engine
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            10000.0,
            {"factor": 2.0, "rope_type": "linear"},
        ),
        (
            {"rope_parameters": None, "rope_theta": 5000.0, "rope_scaling": {"rope_type": "linear", "factor": 4.0}},
            5000.0,
            {"rope_type": "linear", "factor": 4.0},
        ),
        (
            {"rope_parameters": {key: LLAMA3[key] for key in LLAMA3 if key != ORIGINAL}},
            10000.0,
            {key: LLAMA3[key] for key in LLAMA3 if key != "rope_theta"} | {ORIGINAL: 512},  # the model's positions
        ),
    ],
    ids=["both spellings", "the older spelling", "no original length"],
)
def test_rope_is_read_as_the_model_reads_it(changes: dict, base: float, scaling: dict, tmp_path: Path) -> None:
    source = make("llama-scaled", tmp_path)
    place = tmp_path / "model" / "config.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | changes))
    model = open_model(tmp_path / "model")
    config = config_of(write(replace(source, model=model), tmp_path / "out"))
    assert (config["rotary_base"], config["rotary_scaling"]) == (base, scaling)


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.algo)
def test_tensors_of_a_layer(mode: Mode, source: Source, tmp_path: Path) -> None:
    """Names, shapes and dtypes of the format's table, for a gated layer without biases."""
    static, matrix = mode.static and mode.plugin, mode.whole
    one, f32, i8 = (1, 1), torch.float32, torch.int8
    expected = {}
    for name, (rows, columns) in {
        "attention.qkv": (128, 64),
        "attention.dense": (64, 64),
        "mlp.fc": (128, 64),
        "mlp.gate": (128, 64),
        "mlp.proj": (64, 128),
    }.items():
        expected[f"{name}.weight"] = ((rows, columns), i8)
        if not mode.plugin:
            expected[f"{name}.weights_scaling_factor"] = ((rows,), f32)
            expected[f"{name}.activation_scaling_factor"] = ((1,), f32)
            expected[f"{name}.prequant_scaling_factor"] = ((columns,), torch.float16)
            continue
        expected[f"{name}.per_channel_scale"] = (one if matrix and name != "attention.qkv" else (1, rows), f32)
        if static:
            expected[f"{name}.act_scale"] = (one, f32)
        if name in ("attention.dense", "mlp.proj"):
            expected[f"{name}.smoother"] = ((1, columns), f32)
            if static:
                expected[f"{name.partition('.')[0]}.quantization_scaling_factor"] = ((1,), f32)
    expected["attention.kv_cache_scaling_factor"] = ((1,), f32)
    for norm in ("input_layernorm", "post_layernorm"):
        expected[f"{norm}.weight"] = ((64,), torch.float16)
        if mode.plugin:
            expected[f"{norm}.scale_to_int"] = ((1,), f32)
    (found,) = ranks(write(source, tmp_path / "out", mode, kv="int8"))
    prefix = "transformer.layers.3."
    layer = {key.removeprefix(prefix): value for key, value in found.items() if key.startswith(prefix)}
    assert {key: (tuple(value.shape), value.dtype) for key, value in layer.items()} == expected
    assert all(value.isfinite().all() and value.ne(0).any() for value in layer.values())


def test_smoothers(source: Source, tmp_path: Path) -> None:
    """Ones where smoothing is folded; else scales that float16 holds exactly."""
    for groups in ("default", "run-time"):
        (found,) = ranks(write(source, tmp_path / groups, groups=groups))
        for name in ("attention.dense", "mlp.proj"):
            smoother = found[f"transformer.layers.1.{name}.smoother"]
            assert (smoother == 1).all() == (groups == "default")
            assert smoother.half().float().equal(smoother)


def test_interrupted_export_goes_on_and_is_the_same(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workroom, "KEEP_EVERY", -1.0)
    source = replace(source, settings=SmoothingSettings(0.5, cache="shared"))
    options = {"mode": with_cache(STATIC, "int8"), "ranks": Ranks(2, 2)}
    export(source, [TrtllmWriter(tmp_path / "whole", **options)])
    written: list[int] = []

    class Interrupted(TrtllmWriter):
        fail_at: int | None = 3

        def write(self, layer: object, quantized: object) -> None:
            if layer.index == self.fail_at:
                raise KeyboardInterrupt
            written.append(layer.index)
            super().write(layer, quantized)

    with pytest.raises(KeyboardInterrupt):
        export(source, [Interrupted(tmp_path / "resumed", **options)])
    assert not (tmp_path / "resumed").exists()
    Interrupted.fail_at = None
    export(source, [Interrupted(tmp_path / "resumed", **options)])
    assert written == [0, 1, 2, 3]  # none was done twice
    manifest = load_manifest(tmp_path / "whole")
    assert load_manifest(tmp_path / "resumed") == manifest
    for name in manifest.files:
        assert (tmp_path / "resumed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


def test_manifest_explains(source: Source, tmp_path: Path) -> None:
    manifest = load_manifest(write(source, tmp_path / "out", NO_PLUGINS, tp=2))
    assert manifest.step == "export trtllm"
    origin = manifest.origin
    assert (origin.model, origin.act_scales, origin.family) == ("m", None, "llama")
    assert origin.smoothing == SmoothingSettings(0.5, "unfolded", "float16")
    assert origin.schemes == (scheme_of("per-tensor"),)
    assert origin.trtllm == TrtllmOptions("W8A8_SQ_PER_CHANNEL", "float16", 2, 1, "1.2.1")
    assert {"config.json", "rank0.safetensors", "rank1.safetensors", "tokenizer.json"} <= manifest.files.keys()


def test_several_formats_in_one_pass(source: Source, tmp_path: Path) -> None:
    """Per-channel and per-tensor weights of the same layers, each as it would be alone."""
    writers = [
        W8A8Writer(tmp_path / "w8a8"),
        TrtllmWriter(tmp_path / "channel", PER_TOKEN),
        TrtllmWriter(tmp_path / "tensor", MODES[1]),
    ]
    export(source, writers)
    for name, mode in (("channel", PER_TOKEN), ("tensor", MODES[1])):
        (found,), (alone,) = ranks(tmp_path / name), ranks(write(source, tmp_path / f"{name}-alone", mode))
        assert all(found[key].equal(alone[key]) for key in alone)


def test_bfloat16(tmp_path: Path) -> None:
    source = make("qwen2", tmp_path, dtype=torch.bfloat16)
    export(source, [TrtllmWriter(tmp_path / "out", dtype="bfloat16")])
    (found,) = ranks(tmp_path / "out")
    assert config_of(tmp_path / "out")["dtype"] == "bfloat16"
    for name in ("transformer.ln_f.weight", "transformer.layers.0.attention.qkv.bias", "lm_head.weight"):
        assert found[name].dtype == torch.bfloat16
    assert found["transformer.layers.0.mlp.fc.per_channel_scale"].dtype == torch.float32


def test_alibi_is_float16_with_plugins(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """SmoothQuant's attention casts ALiBi's slopes to float16: a bfloat16 checkpoint becomes a float16 engine."""
    source = make("bloom", tmp_path, dtype=torch.bfloat16)
    arguments = [str(source.model.checkpoint.folder), str(tmp_path / "act_scales.safetensors")]
    assert main(["export", "trtllm", *arguments, "--out", str(tmp_path / "out")]) == 0
    assert config_of(tmp_path / "out")["dtype"] == "float16"
    assert not errors(check(tmp_path / "out"))
    capsys.readouterr()
    refused = [*arguments, "--out", str(tmp_path / "refused"), "--dtype", "bfloat16"]
    assert main(["export", "trtllm", *refused]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "bloom in bfloat16 with TensorRT-LLM's plugins" in line
    assert "--dtype float16, or with --no-plugins" in line
    assert main(["export", "trtllm", *refused, "--no-plugins"]) == 0
    assert config_of(tmp_path / "refused")["dtype"] == "bfloat16"
    assert not errors(check(tmp_path / "refused"))


def test_what_float16_cannot_hold_is_named(tmp_path: Path) -> None:
    source = make("llama", tmp_path, dtype=torch.float32)
    path = source.model.checkpoint.tensors["model.norm.weight"].file
    tensors = load_file(path)
    tensors["model.norm.weight"][5] = 1e6
    save_file(tensors, path, {"format": "pt"})
    source = replace(source, model=open_llama(path.parent))  # as it is now
    with pytest.raises(ContractError, match=r"transformer.ln_f.weight overflows torch.float16; .*--dtype bfloat16"):
        write(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("groups", ["default", "run-time"])
@pytest.mark.parametrize("mode", MODES, ids=lambda mode: mode.algo)
def test_what_is_recorded_is_enough_to_quantize_again(mode: Mode, groups: str, source: Source, tmp_path: Path) -> None:
    """`smoothquant validate` computes the layers anew from the folder alone: they are what the stream made."""
    out = write(source, tmp_path / "out", mode, groups=groups, kv="int8")
    scheme, model = read_scheme(out), source.model
    assert scheme.scheme == replace(mode.scheme, kv_cache=SHARED_CACHES["int8"])
    smoothing = settings(mode, groups, "int8")
    for layer in smoothed_layers(model, source.input_absmax, smoothing, output_absmax=source.output_absmax):
        rebuilt = quantize_layer(scheme.layer(model, layer.index, layer.source), scheme.scheme)
        expected = quantize_layer(layer, mode.scheme)
        assert rebuilt.smoothers.keys() == expected.smoothers.keys()
        for role, linear in expected.linears.items():
            assert rebuilt.linears[role].weight.equal(linear.weight), role
            assert rebuilt.linears[role].weight_scale.equal(linear.weight_scale), role
            assert rebuilt.linears[role].input_scale.equal(linear.input_scale), role
        for role, norm in expected.norms.items():
            assert rebuilt.norms[role].weight.equal(norm.weight), role


@pytest.mark.parametrize("tp", [1, 4])
def test_exactness_of_ranks(tp: int, source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`validate --exact` knows that each rank quantizes its own part of an input: if it did not, the engine of four
    ranks would seem far from exact. In float32, where nothing else is rounded."""
    monkeypatch.setattr(interpreter_engine, "Interpreter", partial(Interpreter, precision=EnginePrecision()))
    out = write(replace(source, fingerprints={"model": source.model.checkpoint.fingerprint}), tmp_path / "out", tp=tp)
    text = Text(tuple(sample_ids(sequences=48, tokens=8, seed=3)), "sample")
    [found] = validate_engines({"engine": out}, source.model, text, exact=True)
    assert found.exactness is not None
    assert found.exactness.engine < 0.2 * found.metrics.relative_error
