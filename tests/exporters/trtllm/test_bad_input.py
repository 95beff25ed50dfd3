"""What TensorRT-LLM cannot do is said in one line, with the reason, before anything is written."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from act_scales.store import load_act_scales
from builders.tensorrt_llm.format.checkpoint import load_config
from exporters.export import Source, export
from exporters.huggingface import SmoothedWriter, W8A8Writer
from exporters.onnx import OnnxWriter
from exporters.trtllm import Ranks, TrtllmWriter, choose
from exporters.trtllm.suitable import check_ranks, decoder_of
from exporters.trtllm.versions import check_version
from recipes import tiny_llama
from recipes.cli import main
from recipes.families import open_model
from smoothquant.errors import ActScalesError, UserError
from smoothquant.outputs import MANIFEST, load_manifest
from smoothquant.scheme import scheme_of
from smoothquant.settings import SmoothingSettings
from tests.builders.tensorrt_llm import fake_tools
from tests.exporters.trtllm.checkpoints import NO_PLUGINS, PER_TOKEN, STATIC, make, write
from tests.forked import assert_one_line, smoothquant

REFUSED = {  # layout -> config changes, mode, what is said
    "mixtral": ({}, PER_TOKEN, "mixtral in TensorRT-LLM: its SmoothQuant layers have no experts"),
    "qwen3": ({}, PER_TOKEN, "qwen3 in TensorRT-LLM: its SmoothQuant attention has no norms of queries and keys"),
    "gemma2": ({}, PER_TOKEN, "gemma2 in TensorRT-LLM: its SmoothQuant attention has no soft-capping"),
    "gemma3": ({}, PER_TOKEN, "gemma3 in TensorRT-LLM: its SmoothQuant attention has no norms of queries and keys"),
    "falcon-rw": ({}, PER_TOKEN, "its SmoothQuant FalconForCausalLM has rope_gpt_neox positions, and no scaled ALiBi"),
    "opt": ({}, PER_TOKEN, "opt in TensorRT-LLM: its decoder does not take per-token activations"),
    "opt-350m": ({}, STATIC, "its SmoothQuant layers are normed before each branch and before the head"),
    "phi3-partial": ({}, PER_TOKEN, "its LlamaForCausalLM rotates whole heads, this model only a part"),
    "qwen2-sliding": ({}, PER_TOKEN, "sliding windows in some layers only"),
    "bloom": ({"layer_norm_epsilon": 1e-6}, PER_TOKEN, "the norms of its BloomForCausalLM have epsilon 1e-05"),
    "falcon-40b": ({"layer_norm_epsilon": 1e-6}, PER_TOKEN, "the norms of its FalconForCausalLM have epsilon 1e-05"),
    "falcon-7b": (
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
        PER_TOKEN,
        "its FalconForCausalLM has no RoPE scaling 'linear', only default",
    ),
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return make("llama", tmp_path_factory.mktemp("llama"), hidden_size=96, num_hidden_layers=4, num_attention_heads=6)


@pytest.mark.parametrize("name", REFUSED)
def test_models(name: str, tmp_path: Path) -> None:
    changes, mode, said = REFUSED[name]
    with pytest.raises(UserError) as error:
        write(make(name, tmp_path, **changes), tmp_path / "out", mode)
    assert said in str(error.value)
    assert "w8a8 with vLLM" in str(error.value)
    assert "export onnx" in str(error.value)
    assert not list(tmp_path.glob("out*"))


def test_opt_is_told_what_it_may(tmp_path: Path) -> None:
    source = make("opt", tmp_path)
    with pytest.raises(UserError, match="expected static ones: --act per-tensor, or --no-plugins"):
        write(source, tmp_path / "out")
    for mode in (STATIC, NO_PLUGINS):
        write(source, tmp_path / mode.algo, mode)
    with pytest.raises(
        UserError, match="--pp 2: TensorRT-LLM's OPTForCausalLM has no pipeline stages; expected --pp 1"
    ):
        write(source, tmp_path / "out", STATIC, pp=2)


@pytest.mark.parametrize(
    ("tp", "pp", "said"),
    [
        (4, 1, "--tp 4 does not divide the 6 attention heads; expected one of 1, 2"),
        (3, 1, "--tp 3 does not divide the 128 channels of the MLP; expected one of 1, 2"),
        (1, 3, "--pp 3 does not divide the 4 layers; expected one of 1, 2, 4"),
        (0, 1, "--tp 0; expected at least 1"),
        (1, -1, "--pp -1; expected at least 1"),
    ],
)
def test_ranks(tp: int, pp: int, said: str, llama: Source, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        write(llama, tmp_path / "out", tp=tp, pp=pp)
    assert str(error.value) == said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "changes", "tp", "said"),
    [
        (
            "llama",
            {"hidden_size": 96, "num_attention_heads": 12, "num_key_value_heads": 3, "head_dim": 8},
            4,
            "3 kv heads can neither be divided among",
        ),
        (
            "mistral-nemo",
            {},
            4,
            "--tp 4: a rank's part of a linear's input is no multiple of 16 channels, or of its output of 8, which "
            "SmoothQuant's INT8 kernels demand; expected one of 1, 2; export with --no-plugins, which TensorRT "
            "computes itself, to have --tp 4",
        ),
        (
            "llama",
            {"intermediate_size": 344},
            1,
            "or of its output of 8, which SmoothQuant's INT8 kernels demand; export with --no-plugins, which TensorRT "
            "computes itself, to have --tp 1 or 2 or 4; or serve smoothquant export w8a8 with vLLM",
        ),
        (
            "llama",
            {"hidden_size": 40, "num_attention_heads": 5, "num_key_value_heads": 5, "intermediate_size": 80},
            2,
            "--tp 2 does not divide the 5 attention heads; export with --no-plugins, which TensorRT computes itself, "
            "to have --tp 1 or 5; or serve",
        ),
        ("llama", {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 2}, 1, "which SmoothQuant's INT8"),
        ("falcon-7b", {"bias": True}, 2, "parallel branches with biases, which TensorRT-LLM adds once per rank"),
    ],
)
def test_ranks_of_other_models(name: str, changes: dict, tp: int, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        write(make(name, tmp_path, **changes), tmp_path / "out", tp=tp)
    assert said in str(error.value)


def test_ranks_of_the_bundled_model() -> None:
    """688 channels of the MLP are divided by 2, but not into parts that the plugins take."""
    model = open_model(tiny_llama.PATH)
    with pytest.raises(UserError, match=r"expected one of 1; export with --no-plugins, .* to have --tp 2 or 4 or 8$"):
        check_ranks(model, decoder_of(model, PER_TOKEN), PER_TOKEN, Ranks(2, 1))
    check_ranks(model, decoder_of(model, NO_PLUGINS), NO_PLUGINS, Ranks(2, 1))


def test_only_the_plugins_ask_for_alignment(tmp_path: Path) -> None:
    source = make("llama", tmp_path, intermediate_size=344)
    for tp in (1, 2):
        write(source, tmp_path / f"{tp}", NO_PLUGINS, tp=tp)


@pytest.mark.parametrize(
    "version",
    ["0.20.0", "0.21", "0.21.0", "1.0.0", "1.1.0rc2.post2", "1.2.1", "1.3.0rc0", "1.3.0rc20", "1.3.0rc20.post1"],
)
def test_versions(version: str) -> None:
    check_version(version)


@pytest.mark.parametrize(
    ("version", "said"),
    [
        ("0.17.0", "older than this form of the checkpoint was checked against"),
        ("0.20.0rc3", "older than"),
        ("0.99.0", "TensorRT-LLM 0.99.0: no such version is known here; expected one of 0.20.0, 0.21.0, 1.0.0"),
        ("1.2.9", "1.2.9: no such version is known here"),
        ("1.2.2rc1", "no such version is known here"),
        ("1.1.0.dev2025090100", "no such version is known here"),
        ("1.3.0rc21", "builds no TensorRT engines"),
        ("1.3.0rc21.post1", "builds no TensorRT engines"),
        (
            "1.3.0",
            "builds no TensorRT engines (removed after 1.3.0rc20), and its PyTorch backend does not run W8A8 INT8",
        ),
        ("1.4.0rc1", "builds no TensorRT engines"),
        ("latest", "TensorRT-LLM version 'latest'; expected one of 0.20.0, 0.21.0"),
    ],
)
def test_versions_without_engines(version: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        TrtllmWriter(tmp_path / "out", version=version)
    assert said in str(error.value)


def test_ranges_that_are_missing(llama: Source, tmp_path: Path) -> None:
    """Published .pt scales have no ranges of outputs."""
    published = replace(llama, output_absmax={})
    first = (
        "without the range of the outputs of model.layers.0.self_attn.q_proj; expected output_absmax of every linear"
    )
    for mode, kv in ((STATIC, "float"), (PER_TOKEN, "int8")):
        with pytest.raises(ActScalesError, match=first):
            write(published, tmp_path / "out", mode, kv=kv)
    write(published, tmp_path / "per-token")
    write(published, tmp_path / "no-plugins", NO_PLUGINS)  # its form has no place for them
    with pytest.raises(ActScalesError, match="static activations, and no activation scales"):
        write(replace(llama, input_absmax=None), tmp_path / "out", STATIC)


def test_smoothing_that_a_form_has_no_place_for(llama: Source, tmp_path: Path) -> None:
    def refused(writer: object, settings: SmoothingSettings, said: str) -> None:
        with pytest.raises(UserError, match=said):
            export(replace(llama, settings=settings), [writer])

    run_time = SmoothingSettings(0.5, "run-time", smoother_dtype="float16")
    for writer in (SmoothedWriter, W8A8Writer, OnnxWriter):
        refused(writer(tmp_path / "out"), run_time, "'run-time' with engines that smooth nothing themselves; expected")
    plugins, no_plugins = TrtllmWriter(tmp_path / "out"), TrtllmWriter(tmp_path / "out", NO_PLUGINS)
    refused(no_plugins, SmoothingSettings(), "'default' with W8A8_SQ_PER_CHANNEL, .*; expected one of unfolded")
    refused(plugins, SmoothingSettings(groups="unfolded", smoother_dtype="float16"), "groups 'unfolded'")
    refused(
        plugins,
        replace(run_time, smoother_dtype="bfloat16"),
        "run-time scales in bfloat16 with .*; expected the engine's float16",
    )
    refused(
        plugins,
        SmoothingSettings(cache="shared"),
        "KV cache 'shared' with .*, float KV cache; expected one for 'none'",
    )
    with pytest.raises(UserError, match="dtype 'float32'; expected one of float16, bfloat16"):
        TrtllmWriter(tmp_path / "out", dtype="float32")


def test_schemes_that_no_checkpoint_holds() -> None:
    for more in ({"kv_cache": "int8"}, {"head": "int8"}, {"float_linears": ("down",)}):
        with pytest.raises(UserError, match="expected a cache whose keys and values share their scale; a float head"):
            choose(scheme_of("per-token", **more))
    with pytest.raises(UserError, match="with plugins: float weights with float activations; expected per-channel"):
        choose(scheme_of("float"))
    assert choose(scheme_of("per-token", kv_cache="int8-shared")).cache_algo == "INT8"  # the control


# -- the command line ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(llama: Source) -> Path:
    return llama.model.checkpoint.folder


@pytest.fixture(scope="module")
def scales(folder: Path) -> Path:
    return folder.parent / "act_scales.safetensors"


def test_command_line(folder: Path, scales: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ("--tp", 2, "--pp", 2, "--act", "per-tensor", "--weights", "per-tensor", "--kv", "int8", "--json")
    done = smoothquant("export", "trtllm", folder, scales, "--out", out, *options)
    assert done.returncode == 0, done.stderr
    manifest = json.loads(done.stdout)["manifest"]
    assert manifest["inputs"]["trtllm"]["quant_algo"] == "W8A8_SQ_PER_TENSOR_PLUGIN"
    assert manifest["inputs"]["smoothing"]["cache"] == "shared"
    assert sorted(path.name for path in out.glob("rank*")) == [f"rank{n}.safetensors" for n in range(4)]
    checked = smoothquant("check", out)
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.parametrize(
    ("options", "algo", "groups", "dtype"),
    [
        (("--runtime-smoother", "--dtype", "bfloat16"), "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN", "run-time", "bfloat16"),
        (("--no-plugins",), "W8A8_SQ_PER_CHANNEL", "unfolded", "float16"),
        (("--no-plugins", "--groups", "none"), "W8A8_SQ_PER_CHANNEL", "none", "float16"),
        (("--groups", "paper"), "W8A8_SQ_PER_CHANNEL_PER_TOKEN_PLUGIN", "paper", "float16"),
    ],
)
def test_options(
    options: tuple[str, ...], algo: str, groups: str, dtype: str, folder: Path, scales: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert main(["export", "trtllm", str(folder), str(scales), "--out", str(out), "--quiet", *options]) == 0
    inputs = json.loads((out / MANIFEST).read_text())["inputs"]
    told = inputs["trtllm"]
    assert (told["quant_algo"], inputs["smoothing"]["groups"], told["dtype"]) == (algo, groups, dtype)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--no-plugins", "--runtime-smoother"), "--no-plugins and --runtime-smoother; expected one of them"),
        (
            ("--no-plugins", "--act", "per-token"),
            "without plugins: per-channel weights with per-token activations; expec",
        ),
        (
            ("--runtime-smoother", "--groups", "paper"),
            "smoothing groups 'paper' with --runtime-smoother; expected one of run-time (the default)",
        ),
        (
            ("--no-plugins", "--groups", "paper"),
            "smoothing groups 'paper' with W8A8_SQ_PER_CHANNEL, float KV cache; expected one of unfolded (the default)",
        ),
        (("--trtllm-version", "1.3.0"), "TensorRT-LLM 1.3.0 builds no TensorRT engines"),
        (("--tp", "4"), "--tp 4 does not divide the 6 attention heads"),
    ],
)
def test_options_that_contradict(
    options: tuple[str, ...], said: str, folder: Path, scales: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    out = tmp_path / "out"
    assert main(["export", "trtllm", str(folder), str(scales), "--out", str(out), *options]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert lines[-1].startswith(f"smoothquant: {said}")
    assert not out.exists()


def test_published_scales(folder: Path, scales: Path, tmp_path: Path) -> None:
    """Per token they are enough; for what needs the ranges of outputs, one line."""
    published = tmp_path / "scales.pt"
    load_act_scales(scales).save_pt(published)
    arguments = ["export", "trtllm", str(folder), str(published), "--out", str(tmp_path / "out")]
    found = smoothquant(*arguments, "--act", "per-tensor")
    assert_one_line(found, 2, "without the range of the outputs", "calibrate this model")
    assert main([*arguments, "--kv", "int8"]) == 2
    assert not (tmp_path / "out").exists()
    assert main(arguments) == 0
    assert load_file(tmp_path / "out/rank0.safetensors")


@pytest.mark.parametrize("layout", ["mistral", "phi3-sliding"])
def test_a_window_reaches_the_server(layout: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """config.json has no place for it: from manifest to manifest, to trtllm-build, Triton and trtllm-serve."""
    source = make(layout, tmp_path, sliding_window=6)
    arguments = [str(source.model.checkpoint.folder), str(tmp_path / "act_scales.safetensors")]
    checkpoint, engine, served = (str(tmp_path / name) for name in ("checkpoint", "engine", "served"))
    assert main(["export", "trtllm", *arguments, "--out", checkpoint]) == 0
    assert "sliding window of 6 tokens" in capsys.readouterr().err
    assert load_config(Path(checkpoint)).window == 6
    environment = fake_tools.install(tmp_path / "tools")
    command = ("build", "tensorrt-llm", checkpoint, "--out", engine)
    assert smoothquant(*command, "--max-seq-len", "32", env=environment).returncode == 0
    manifest = load_manifest(engine)
    assert manifest.facts.cache_window == 6
    assert "--use_paged_context_fmha disable" in " ".join(manifest.results["command"])
    assert main(["serve-config", engine, "--out", served, "--tokenizer", arguments[0]]) == 0
    config = (Path(served) / "tensorrt_llm/config.pbtxt").read_text()
    assert re.search(r'key: "max_attention_window_size"\s+value \{\s+string_value: "6"', config)
    assert yaml.safe_load((Path(served) / "llm_api_options.yaml").read_text()) == {
        "kv_cache_config": {
            "free_gpu_memory_fraction": 0.9,
            "max_attention_window": [6],
            "enable_block_reuse": False,
        },
        "enable_chunked_prefill": False,
    }
