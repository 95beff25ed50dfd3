"""The repository, parsed by protocol buffers with Triton's own ModelConfig, and its Python models, run."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy
import pytest
import yaml
from google.protobuf import text_format
from tokenizers import Tokenizer, processors

from builders.serving.tensorrt_llm.models import REQUEST, TOKENS
from builders.serving.tensorrt_llm.repository import MODELS, read_engine, request_example, write_repository
from recipes.cli import main
from smoothquant.errors import OutputError, UserError
from smoothquant.outputs import TOP_MANIFEST
from tests.forked import assert_one_line, smoothquant
from tests.models import save_tokenizer


@pytest.fixture(scope="session")
def model_config() -> Callable[[], Any]:
    """Triton's ModelConfig, out of its client package (whose own import wants gRPC)."""
    try:
        path = distribution("tritonclient").locate_file("tritonclient/grpc/model_config_pb2.py")
    except PackageNotFoundError:
        pytest.skip("tritonclient is not installed")
    return load_module("model_config_pb2", Path(str(path))).ModelConfig


def load_module(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def engine(folder: Path, *, version: str = "1.1.0", tp: int = 1, paged: bool = True, tokenizer: bool = True) -> Path:
    """An engine folder, as far as serving looks at it."""
    folder.mkdir()
    content = {
        "version": version,
        "pretrained_config": {"mapping": {"world_size": tp, "tp_size": tp, "pp_size": 1}},
        "build_config": {"max_batch_size": 16, "plugin_config": {"use_paged_context_fmha": paged}},
    }
    (folder / "config.json").write_text(json.dumps(content))
    if tokenizer:
        save_tokenizer(folder)
    return folder


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"pretrained_config": {"mapping": [1]}},
            "pretrained_config.mapping is [1]; expected an object; build it again",
        ),
        ({"pretrained_config": {"mapping": {"tp_size": "2"}}}, 'tp_size is "2"; expected a whole number from 1'),
        ({"pretrained_config": {"mapping": {"pp_size": 2**40}}}, "pp_size is 1099511627776; expected a whole number"),
        ({"build_config": {"max_batch_size": -1}}, "max_batch_size is -1; expected a whole number from 1"),
        ({"build_config": {"plugin_config": "x"}}, 'build_config.plugin_config is "x"; expected an object'),
        ({"build_config": []}, "not a TensorRT-LLM engine"),
        ({"version": [1]}, "built by TensorRT-LLM [1]"),
    ],
)
def test_an_engines_config_of_another_type(changes: dict, said: str, tmp_path: Path) -> None:
    place = engine(tmp_path / "engine") / "config.json"
    place.write_text(json.dumps(json.loads(place.read_text()) | changes))
    with pytest.raises(UserError) as caught:
        read_engine(tmp_path / "engine")
    assert said in str(caught.value)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    write_repository(engine(tmp_path / "engine"), tmp_path / "repository")
    return tmp_path / "repository"


def test_every_folder_of_the_repository_is_a_model(repository: Path) -> None:
    """Triton would take one of ours for a model, too."""
    assert {path.name for path in repository.iterdir() if path.is_dir()} == set(MODELS)
    assert {path.name for path in repository.iterdir() if path.is_file()} == {"llm_api_options.yaml", TOP_MANIFEST}


def configs(repository: Path, model_config: Callable[[], Any]) -> dict[str, Any]:
    texts = {name: (repository / name / "config.pbtxt").read_text() for name in MODELS}
    return {name: text_format.Parse(text, model_config()) for name, text in texts.items()}


def test_configs_are_what_triton_parses(repository: Path, model_config: Callable[[], Any], tmp_path: Path) -> None:
    for name, config in configs(repository, model_config).items():
        assert (config.name, config.max_batch_size) == (name, 16)
        assert (repository / name / "1").is_dir()
    found = configs(repository, model_config)
    parameters = {key: value.string_value for key, value in found["tensorrt_llm"].parameters.items()}
    assert parameters["gpt_model_path"] == str(tmp_path / "engine")
    assert parameters["gpt_model_type"] == "inflight_fused_batching"
    assert parameters["enable_kv_cache_reuse"] == "true"
    # read without a fallback: they must be there, and empty switches the feature off
    assert (parameters["guided_decoding_backend"], parameters["xgrammar_tokenizer_info_path"]) == ("", "")
    assert parameters["tokenizer_dir"] == str(tmp_path / "engine")
    assert found["tensorrt_llm"].backend == "tensorrtllm"
    assert found["preprocessing"].parameters["tokenizer_dir"].string_value == str(tmp_path / "engine")
    assert not found["tensorrt_llm"].model_transaction_policy.decoupled


def test_the_ensemble_fits_its_models(repository: Path, model_config: Callable[[], Any]) -> None:
    """Every tensor that is handed on has one type and shape at both ends; nothing that is demanded is missing."""
    found = configs(repository, model_config)
    ensemble = found["ensemble"]
    tensors = {tensor.name: tensor for tensor in ensemble.input}
    for step in ensemble.ensemble_scheduling.step:
        model = found[step.model_name]
        inputs = {tensor.name: tensor for tensor in model.input}
        for theirs, ours in step.input_map.items():
            source, target = tensors[ours], inputs[theirs]
            assert source.data_type == target.data_type, theirs
            assert list(source.dims) == list(target.dims), theirs
            assert target.optional or not getattr(source, "optional", False), theirs
        assert {name for name, tensor in inputs.items() if not tensor.optional} <= set(step.input_map)
        outputs = {tensor.name: tensor for tensor in model.output}
        tensors |= {ours: outputs[theirs] for theirs, ours in step.output_map.items()}
    (answer,) = ensemble.output
    assert tensors[answer.name].data_type == answer.data_type
    assert [tensor.name for tensor in ensemble.input if not tensor.optional] == ["text_input", "max_tokens"]


def test_names_of_the_backend() -> None:
    """As NVIDIA's template has them: a name that it does not know would be dropped in silence."""
    template = {
        "input_ids", "input_lengths", "request_output_len", "end_id", "pad_id", "stop_words_list", "temperature",
        "runtime_top_k", "runtime_top_p", "repetition_penalty", "min_tokens", "presence_penalty", "frequency_penalty",
        "seed",
    }  # fmt: skip
    assert {theirs for theirs, _ in REQUEST.values()} | {theirs for theirs, _ in TOKENS.values()} == template


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            {"version": "1.1.0"},
            "nvcr.io/nvidia/tensorrt-llm/release:1.1.0 trtllm-serve {engine} --tokenizer {engine} --backend trt "
            "--extra_llm_api_options {repository}/llm_api_options.yaml "
            "--kv_cache_free_gpu_memory_fraction 0.9 --host 0.0.0.0 --port 8000",
        ),
        (
            {"version": "0.21.0"},
            "nvcr.io/nvidia/tensorrt-llm/release:0.21.0 trtllm-serve {engine} --tokenizer {engine} "
            "--extra_llm_api_options {repository}/llm_api_options.yaml "
            "--kv_cache_free_gpu_memory_fraction 0.9 --host 0.0.0.0 --port 8000",
        ),
        (
            {"version": "1.2.1", "tp": 4, "paged": False},
            "nvcr.io/nvidia/tensorrt-llm/release:1.2.1 trtllm-serve {engine} --tokenizer {engine} --backend trt "
            "--tp_size 4 --pp_size 1 --extra_llm_api_options {repository}/llm_api_options.yaml "
            "--kv_cache_free_gpu_memory_fraction 0.9 --host 0.0.0.0 --port 8000",
        ),
    ],
)
def test_commands(options: dict, expected: str, tmp_path: Path) -> None:
    folder, out = engine(tmp_path / "engine", **options), tmp_path / "repository"
    found = write_repository(folder, out)
    assert found.trtllm_serve.endswith(expected.format(engine=folder, repository=out))
    if options["version"] == "1.2.1":
        assert found.triton is None
    else:
        tag = {"1.1.0": "25.12", "0.21.0": "25.08"}[options["version"]]
        assert f"tritonserver:{tag}-trtllm-python-py3 python3 /app/scripts/launch_triton_server.py" in found.triton
        assert f"--world_size=1 --model_repo={out}" in found.triton


def test_an_engine_that_no_triton_runs(tmp_path: Path) -> None:
    folder = engine(tmp_path / "engine", version="1.2.1")
    said = smoothquant("serve-config", folder, "--out", tmp_path / "repository").stdout
    assert "NVIDIA lists no container with TensorRT-LLM 1.2.1; it has 0.20.0 (25.07)" in said
    assert "trtllm-serve  docker run --rm --gpus all" in said


def test_both_servers_take_prompts_in_pieces(tmp_path: Path, model_config: Callable[[], Any]) -> None:
    """The engine takes 8192 tokens in a step, and prompts as long as its context."""
    out = tmp_path / "repository"
    write_repository(engine(tmp_path / "engine"), out)
    assert configs(out, model_config)["tensorrt_llm"].parameters["enable_chunked_context"].string_value == "true"
    assert yaml.safe_load((out / "llm_api_options.yaml").read_text()) == {"enable_chunked_prefill": True}


def test_an_int8_cache_is_not_reused(tmp_path: Path, model_config: Callable[[], Any]) -> None:
    out = tmp_path / "repository"
    write_repository(engine(tmp_path / "engine", paged=False), out, memory=0.5)
    parameters = configs(out, model_config)["tensorrt_llm"].parameters
    assert parameters["enable_kv_cache_reuse"].string_value == "false"
    assert parameters["enable_chunked_context"].string_value == "false"
    options = yaml.safe_load((out / "llm_api_options.yaml").read_text())
    assert options["kv_cache_config"] == {"free_gpu_memory_fraction": 0.5, "enable_block_reuse": False}


def test_a_window_that_is_given(tmp_path: Path, model_config: Callable[[], Any], capsys: pytest.CaptureFixture) -> None:
    """For an engine without our manifest. One that is no shorter than the longest sequence is none."""
    folder = engine(tmp_path / "engine")
    content = json.loads((folder / "config.json").read_text())
    content["build_config"]["max_seq_len"] = 4096
    (folder / "config.json").write_text(json.dumps(content))
    for window, told in ((1024, ["1024"]), (4096, [])):
        out = tmp_path / str(window)
        assert main(["serve-config", str(folder), "--out", str(out), "--window", str(window)]) == 0
        parameters = configs(out, model_config)["tensorrt_llm"].parameters
        assert [parameters[key].string_value for key in parameters if key == "max_attention_window_size"] == told
        assert parameters["enable_kv_cache_reuse"].string_value == ("false" if told else "true")
    capsys.readouterr()
    assert main(["serve-config", str(folder), "--out", str(tmp_path / "no"), "--window", "0"]) == 2
    assert "--window 0; expected a number of tokens" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "older"),
    [
        ("API_OPTIONS", "options.yaml"),
        ("_api_options", lambda serving: "enable_chunked_prefill: false\n"),
        ("MODELS", MODELS | {"preprocessing": (MODELS["preprocessing"][0], "postprocessing.py")}),
    ],
)
def test_a_repository_of_an_older_version_is_not_finished(
    name: str, older: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One without the file that a command names, with other options, or with another program in it."""
    folder, out = engine(tmp_path / "engine"), tmp_path / "repository"
    with monkeypatch.context() as patched:
        patched.setattr(f"builders.serving.tensorrt_llm.repository.{name}", older)
        write_repository(folder, out)
    with pytest.raises(OutputError, match="was not made by this command with these inputs"):
        write_repository(folder, out)
    write_repository(folder, out, overwrite=True)
    assert (out / "llm_api_options.yaml").read_text().startswith("enable_chunked_prefill: true")
    assert "INPUT_IDS" in (out / "preprocessing/1/model.py").read_text()
    write_repository(folder, out)  # finished


def test_places_of_the_server(tmp_path: Path, model_config: Callable[[], Any]) -> None:
    folder, words = engine(tmp_path / "engine", tokenizer=False), tmp_path / 'a "tokenizer"'
    words.mkdir()
    save_tokenizer(words)
    arguments = ("serve-config", folder, "--out", tmp_path / "repository", "--engine-at", "/engines/llama")
    assert_one_line(smoothquant(*arguments), 2, f"{folder}: no tokenizer", "give --tokenizer")
    more = ("--tokenizer", words, "--repository-at", "/repository", "--memory", 0.5, "--instances", 4)
    found = smoothquant(*arguments, *more, "--json")
    assert found.returncode == 0, found.stderr
    content = json.loads(found.stdout)
    parsed = configs(tmp_path / "repository", model_config)
    assert parsed["tensorrt_llm"].parameters["gpt_model_path"].string_value == "/engines/llama"
    assert parsed["tensorrt_llm"].parameters["kv_cache_free_gpu_mem_fraction"].string_value == "0.5"
    assert parsed["preprocessing"].parameters["tokenizer_dir"].string_value == str(words)
    assert parsed["preprocessing"].instance_group[0].count == 4
    assert "--model_repo=/repository" in content["triton"]
    served = shlex.split(content["trtllm_serve"])
    assert str(words) in served
    assert served[served.index("--kv_cache_free_gpu_memory_fraction") + 1] == "0.5"


def test_what_is_no_engine(tmp_path: Path) -> None:
    out = tmp_path / "repository"
    with pytest.raises(UserError, match="not a TensorRT-LLM engine"):
        write_repository(tmp_path, out)
    with pytest.raises(UserError, match=r"built by TensorRT-LLM 0\.17\.0"):
        write_repository(engine(tmp_path / "engine", version="0.17.0"), out)
    with pytest.raises(UserError, match=r"--memory 1\.5.*\(0, 1\)"):
        write_repository(engine(tmp_path / "new"), out, memory=1.5)
    assert not out.exists()


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (("pretrained_config",), [1], "not a TensorRT-LLM engine"),
        (("build_config",), 7, "not a TensorRT-LLM engine"),
        (("version",), [1], "built by TensorRT-LLM"),
        (
            ("pretrained_config", "mapping", "tp_size"),
            2**40,
            "tp_size is 1099511627776; expected a whole number from 1 to 1024",
        ),
        (("pretrained_config", "mapping", "pp_size"), "2", 'pp_size is "2"; expected a whole number from 1 to 1024'),
        (
            ("build_config", "max_batch_size"),
            10**9,
            "max_batch_size is 1000000000; expected a whole number from 1 to 1048576",
        ),
        (("build_config", "max_batch_size"), [1], "max_batch_size is [1]; expected a whole number"),
    ],
)
def test_a_config_of_another_shape(place: tuple[str, ...], value: object, said: str, tmp_path: Path) -> None:
    folder = engine(tmp_path / "engine")
    content = json.loads((folder / "config.json").read_text())
    inner = content
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=re.escape(said)):
        write_repository(folder, tmp_path / "repository")


def test_a_request_holds_any_text() -> None:
    odd = 'a "b" \\ \n\t ü 模'
    assert json.loads(shlex.split(request_example(odd))[-1])["text_input"] == odd


# -- the Python models, in a Triton that only pretends ---------------------------------------------------------------


@dataclass
class FakeTensor:
    name: str
    array: numpy.ndarray

    def as_numpy(self) -> numpy.ndarray:
        return self.array


@dataclass
class FakeResponse:
    output_tensors: list[FakeTensor] = field(default_factory=list)
    error: str | None = None

    def __getitem__(self, name: str) -> numpy.ndarray:
        return next(tensor.array for tensor in self.output_tensors if tensor.name == name)


@pytest.fixture
def start(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Start a model of the repository, as Triton does: with its config as JSON."""
    fake: Any = ModuleType("triton_python_backend_utils")
    fake.Tensor, fake.InferenceResponse, fake.TritonError = FakeTensor, FakeResponse, str
    fake.get_input_tensor_by_name = lambda request, name: FakeTensor(name, request[name])
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", fake)

    def started(name: str) -> Any:
        model = load_module(f"{name}_model", repository / name / "1/model.py").TritonPythonModel()
        folder = {"string_value": str(repository.parent / "engine")}
        model.initialize({"model_config": json.dumps({"parameters": {"tokenizer_dir": folder}})})
        return model

    return started


def query(*texts: str) -> dict[str, numpy.ndarray]:
    return {"QUERY": numpy.array([[text.encode()] for text in texts], dtype=object)}


def test_text_to_tokens_and_back(start: Callable[[str], Any]) -> None:
    model = start("preprocessing")
    one, two = model.execute([query("def f"), query("a", "über")])
    assert one["INPUT_IDS"].tolist() == [[ord(c) - 33 if c != " " else 220 for c in "def f"]]
    assert one["INPUT_LENGTHS"].tolist() == [[5]]
    assert (one["END_ID"].tolist(), one["PAD_ID"].tolist()) == ([[257]], [[257]])
    assert one["STOP_WORDS"].tolist() == [[[0], [-1]]]
    assert two["INPUT_LENGTHS"].tolist() == [[1], [5]]
    assert two["INPUT_IDS"].shape == (2, 5)
    assert two["INPUT_IDS"][0, 1:].tolist() == [257] * 4  # padded
    assert all(tensor.array.dtype == numpy.int32 for tensor in two.output_tensors)
    tokens = numpy.array([[[*two["INPUT_IDS"][1].tolist(), 257, 9]], [[72, 257, 0, 0, 0, 0, 0]]])
    back = start("postprocessing").execute([{"TOKENS": tokens, "SEQUENCE_LENGTH": numpy.array([[6], [1]])}])[0]
    assert back["OUTPUT"].tolist() == [["über".encode()], [b"i"]]


def test_a_bad_request_is_its_own_error(start: Callable[[str], Any]) -> None:
    bad, good = start("preprocessing").execute([query(""), query("a")])
    assert re.match("preprocessing: .*no tokens", bad.error)
    assert good.error is None


def test_several_end_tokens(start: Callable[[str], Any], tmp_path: Path) -> None:
    """As Llama 3 has them: the tokenizer's own ends the answer, the others are stop words."""
    (tmp_path / "engine/generation_config.json").write_text(json.dumps({"eos_token_id": [5, 257, 7]}))
    response = start("preprocessing").execute([query("a", "b")])[0]
    assert response["END_ID"].tolist() == [[257], [257]]
    assert response["STOP_WORDS"].tolist() == [[[5, 7], [1, 2]]] * 2


def test_end_tokens_that_null_leaves_to_the_config(start: Callable[[str], Any], tmp_path: Path) -> None:
    (tmp_path / "engine/generation_config.json").write_text(json.dumps({"eos_token_id": None}))
    (tmp_path / "engine/config.json").write_text(json.dumps({"eos_token_id": [257, 6]}))
    assert start("preprocessing").execute([query("a")])[0]["STOP_WORDS"].tolist() == [[[6], [1]]]


def test_a_prompt_gets_its_first_token_once(start: Callable[[str], Any], tmp_path: Path) -> None:
    path = tmp_path / "engine/tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 256)])
    tokenizer.save(str(path))
    one, two = start("preprocessing").execute([query("abc"), query("<s>abc")])
    assert one["INPUT_IDS"].tolist() == two["INPUT_IDS"].tolist()
    assert one["INPUT_IDS"][0, 0] == 256


@pytest.mark.parametrize("name", ["preprocessing", "postprocessing"])
def test_code_of_a_tokenizer_never_runs(
    name: str, start: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = tmp_path / "engine"
    (engine / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass T:\n    pass\n")
    config = json.loads((engine / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "T", "auto_map": {"AutoTokenizer": ["code.T", "code.T"]}}
    (engine / "tokenizer_config.json").write_text(json.dumps(config))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with pytest.raises(ValueError, match="trust_remote_code"):
        start(name)
    assert not (tmp_path / "ran").exists()
