"""Model repositories: configs that Triton's own protobuf reads, and sequences whose cache the server keeps."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest

pytest.importorskip("tritonclient.grpc")

from tritonclient.grpc import model_config_pb2

from builders import onnxruntime
from builders.onnxruntime import providers
from builders.serving.triton import TritonEngine, model_name, server_options, write_model
from builders.tensorrt import hardware
from builders.tensorrt.build import build as build_tensorrt
from exporters.export import Source, export
from recipes.cli import main
from smoothquant.errors import MissingPackageError, OutputError, UserError
from smoothquant.settings import SmoothingSettings
from tests.builders.serving.triton.server import Server, parse
from tests.builders.tensorrt import fake
from tests.models import open_llama, sample_ids
from tests.outputs import top
from tests.writers import onnx_writer

PROMPT = [256, 5, 6, 7, 40, 41]
TYPES = model_config_pb2.DataType


@pytest.fixture
def cpu_engine(exports: dict[str, Path], tmp_path: Path) -> Path:
    onnxruntime.build(exports["per-token"], tmp_path / "int8-engine")
    return tmp_path / "int8-engine"


@pytest.fixture
def plan(exports: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setitem(sys.modules, "tensorrt", fake.module())
    monkeypatch.setattr(hardware, "find_gpu", fake.FakeGpu)
    build_tensorrt(exports["per-token"], tmp_path / "plan-engine", {"length": 64, "chunk": 4})
    return tmp_path / "plan-engine"


# -- the repository ----------------------------------------------------------------------------------------------------


def test_onnxruntime_model(cpu_engine: Path, tmp_path: Path) -> None:
    model = write_model(cpu_engine, tmp_path / "repository")
    assert model == tmp_path / "repository/int8-engine"
    assert top(model) == {"1", "config.pbtxt"}
    assert {path.name for path in (model / "1").iterdir()} == {"model.onnx", "model.onnx.data"}
    for path in (model / "1").iterdir():
        assert path.read_bytes() == (cpu_engine / path.name).read_bytes()
        assert not path.samefile(cpu_engine / path.name)
    config = parse((model / "config.pbtxt").read_text())
    assert (config.backend, config.name, config.max_batch_size) == ("onnxruntime", "", 0)
    shapes = {tensor.name: (TYPES.Name(tensor.data_type), list(tensor.dims)) for tensor in config.input}
    assert shapes == dict.fromkeys(("input_ids", "attention_mask", "position_ids"), ("TYPE_INT64", [1, -1]))
    [logits] = config.output
    assert (logits.name, TYPES.Name(logits.data_type), list(logits.dims)) == ("logits", "TYPE_FP32", [1, -1, 288])
    states = config.sequence_batching.state
    assert [(state.input_name, state.output_name) for state in states] == [
        (f"past_key_values.{layer}.{part}", f"present.{layer}.{part}") for layer in (0, 1) for part in ("key", "value")
    ]
    assert all(list(state.dims) == [1, 2, -1, 16] for state in states)
    assert config.instance_group[0].kind == model_config_pb2.ModelInstanceGroup.KIND_CPU
    assert "intra_op_thread_count" in config.parameters


def test_tensorrt_model(plan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_model(plan, tmp_path / "repository")
    assert (model / "1/model.plan").read_bytes() == (plan / "model.plan").read_bytes()
    assert not (model / "1/model.plan").samefile(plan / "model.plan")
    text = (model / "config.pbtxt").read_text()
    config = parse(text)
    assert config.backend == "tensorrt"
    [group] = config.instance_group
    assert group.kind == model_config_pb2.ModelInstanceGroup.KIND_GPU
    assert list(group.profile) == ["0", "1"]
    assert "# Built by TensorRT 11.1.0.106 on NVIDIA H100 80GB HBM3" in text
    assert "at most 4 tokens, the short one first" in text
    each = 2 * 4 * 4 * 2 * 16 * 64  # read and written, 2 layers x 2, float32
    assert f"of 16 sequences at their longest, {each} bytes each" in text
    assert server_options(plan) == [f"--cuda-memory-pool-byte-size=0:{16 * each + 2**26}"]
    assert f"tritonserver --cuda-memory-pool-byte-size=0:{16 * each + 2**26}\n" in text
    for room, held in ((5 * each, 5), (each // 2, 1)):
        monkeypatch.setattr(sys.modules["builders.serving.triton.repository"], "POOL", room)
        assert server_options(plan) == [f"--cuda-memory-pool-byte-size=0:{held * each + 2**26}"]


@pytest.fixture
def built(llama_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Engines for providers that are not here: built("cuda", "per-token", "fp16", model="m") -> folder."""
    build = sys.modules["builders.onnxruntime.build"]
    monkeypatch.setattr(build, "check_available", lambda provider: None)
    monkeypatch.setattr(build, "_check", lambda *_: {"integer": 0, "quantized": 8})

    def engine(provider: str, activations: str, body: str, model: str = "m") -> Path:
        source = Source(open_llama(llama_folder), SmoothingSettings(groups="none"), None, {"model": model})
        made = tmp_path / "-".join((activations, body, model))
        export(source, [onnx_writer(made, activations, body)])
        onnxruntime.build(made, tmp_path / provider, provider=provider, overwrite=True)
        return tmp_path / provider

    return engine


def accelerated(model: Path) -> dict[str, str]:
    """The parameters of a model's accelerator."""
    found = parse((model / "config.pbtxt").read_text())
    [accelerator] = found.optimization.execution_accelerators.gpu_execution_accelerator
    assert accelerator.name == "tensorrt"
    assert found.instance_group[0].kind == model_config_pb2.ModelInstanceGroup.KIND_GPU
    return dict(accelerator.parameters)


def test_half_precision(built: Callable[..., Path], tmp_path: Path) -> None:
    """The caches are of the body's type."""
    model = write_model(built("cuda", "per-token", "fp16"), tmp_path / "repository")
    found = parse((model / "config.pbtxt").read_text())
    assert found.instance_group[0].kind == model_config_pb2.ModelInstanceGroup.KIND_GPU
    assert not found.optimization.execution_accelerators.gpu_execution_accelerator
    assert all(TYPES.Name(state.data_type) == "TYPE_FP16" for state in found.sequence_batching.state)


@pytest.mark.parametrize(
    ("activations", "body", "mode"),
    [("per-token", "fp32", "INT8"), ("float", "fp32", "FP32"), ("float", "fp16", "FP16")],
)
def test_precision_of_the_accelerator(
    activations: str, body: str, mode: str, built: Callable[..., Path], tmp_path: Path
) -> None:
    """It takes one profile for all lengths, and needs no calibration where the graph has the scales."""
    found = accelerated(write_model(built("tensorrt", activations, body), tmp_path / "repository"))
    assert found["precision_mode"] == mode
    assert found["trt_profile_max_shapes"].startswith(
        "input_ids:1x512,attention_mask:1x1024,position_ids:1x512,past_key_values.0.key:1x2x512x16,"
    )
    assert set(found) == {
        "precision_mode", "trt_engine_cache_enable", "trt_engine_cache_path",
        "trt_profile_min_shapes", "trt_profile_opt_shapes", "trt_profile_max_shapes",
    }  # fmt: skip


def test_compiled_engines_are_not_shared(built: Callable[..., Path], tmp_path: Path) -> None:
    """ONNX Runtime does not tell two checkpoints of an architecture apart."""
    places = []
    for checkpoint in ("one", "other"):
        model = write_model(built("tensorrt", "per-token", "fp32", checkpoint), tmp_path / "models", overwrite=True)
        places.append(accelerated(model)["trt_engine_cache_path"])
        assert f" in {places[-1]}; a folder mounted there" in (model / "config.pbtxt").read_text()
    assert places[0] != places[1]
    assert all(Path(place).parent == Path("/tmp") for place in places)
    assert all(Path(place).name.startswith("tensorrt-") for place in places)


@pytest.mark.parametrize(
    ("provider", "said"),
    [
        ("nv-tensorrt-rtx", "no provider nv-tensorrt-rtx; expected --provider cpu, cuda or tensorrt"),
        ("tensorrt", "no INT8 products in a half-precision body"),
    ],
)
def test_what_the_backend_cannot_be_told(
    provider: str,
    said: str,
    built: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Said by the library of an engine, and by the command line before it is built."""
    engine, repository = built(provider, "per-token", "fp16"), tmp_path / "repository"
    with pytest.raises(UserError) as caught:
        write_model(engine, repository)
    assert said in str(caught.value)
    monkeypatch.setattr(onnxruntime, "build", lambda *_, **__: pytest.fail("built"))
    made = [str(tmp_path / "per-token-fp16-m"), "--out", str(tmp_path / "new"), "--provider", provider]
    assert main(["build", "onnxruntime", *made, "--triton", str(repository)]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert said in line
    assert not repository.exists()


def test_a_graph_that_is_too_large_for_the_backend(
    built: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The option that it would need is not among the backend's, which refuses any that it does not know."""
    engine, repository = built("tensorrt", "per-token", "fp32"), tmp_path / "repository"
    monkeypatch.setattr(providers, "LARGEST_MESSAGE", 100_000)
    with pytest.raises(UserError, match="at most 2 GB, since it lacks the option trt_load_user_initializer"):
        write_model(engine, repository)
    monkeypatch.setattr(onnxruntime, "build", lambda *_, **__: pytest.fail("built"))
    made = [str(tmp_path / "per-token-fp32-m"), "--out", str(tmp_path / "new"), "--provider", "tensorrt"]
    assert main(["build", "onnxruntime", *made, "--triton", str(repository)]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "serve it with smoothquant build tensorrt --triton" in line
    assert not repository.exists()


def test_written_once(cpu_engine: Path, plan: Path, tmp_path: Path) -> None:
    model = write_model(cpu_engine, tmp_path / "repository")
    before = (model / "config.pbtxt").stat().st_mtime_ns
    assert write_model(cpu_engine, tmp_path / "repository") == model
    assert (model / "config.pbtxt").stat().st_mtime_ns == before
    plan.rename(tmp_path / "other")
    cpu_engine.rename(tmp_path / "kept")
    (tmp_path / "other").rename(cpu_engine)  # another engine of this name
    with pytest.raises(OutputError, match="exists and was not made by this command"):
        write_model(cpu_engine, tmp_path / "repository")
    write_model(cpu_engine, tmp_path / "repository", overwrite=True)
    assert [path.name for path in (model / "1").iterdir()] == ["model.plan"]


@pytest.mark.parametrize("target", ["onnxruntime", "tensorrt"])
@pytest.mark.parametrize(
    ("repository", "said"),
    [("file/repository", "cannot write there (Not a directory)"), (".", "would be the engine's own folder")],
)
def test_a_place_that_cannot_be_written_is_found_before_the_build(
    repository: str,
    said: str,
    target: str,
    exports: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(f"builders.{target}.build", lambda *_, **__: pytest.fail("built"))
    made = ["--out", str(tmp_path / "engine"), "--triton", str(tmp_path / repository)]
    assert main(["build", target, str(exports["per-token"]), *made]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"smoothquant: --triton {tmp_path / repository}: ")
    assert said in line


def test_what_triton_does_not_run(exports: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"made by 'export onnx', which Triton's backends do not run; expected made by"):
        write_model(exports["float"], tmp_path / "repository")
    with pytest.raises(UserError, match="not an output of this tool"):
        write_model(tmp_path, tmp_path / "repository")


def test_names() -> None:
    assert model_name("/models/llama 2 (7b)") == "llama_2__7b_"


# -- a sequence on the server ------------------------------------------------------------------------------------------


@pytest.fixture
def served(exports: dict[str, Path], tmp_path: Path) -> Callable[[Path], tuple[TritonEngine, Server]]:
    def serve(engine: Path) -> tuple[TritonEngine, Server]:
        server = Server(write_model(engine, tmp_path / "repository"), exports["per-token"])
        return TritonEngine(engine, "localhost:8001", client=server), server

    return serve


@pytest.mark.parametrize("kind", ["cpu_engine", "plan"])
def test_generates_what_the_engine_does(
    kind: str, served: Any, exports: dict[str, Path], request: pytest.FixtureRequest
) -> None:
    """A hidden first position changes no token; the server has forgotten the sequence when it ends."""
    engine, server = served(request.getfixturevalue(kind))
    found = list(engine.generate(PROMPT, 24))
    assert found == list(onnxruntime.OnnxRuntimeEngine(exports["per-token"]).generate(PROMPT, 24))
    assert server.live == {}
    assert server.requests[:2] == ([2, 4] if kind == "plan" else [6, 1])


def test_logits_are_the_engines(plan: Path, served: Any, exports: dict[str, Path]) -> None:
    engine, server = served(plan)
    ids = sample_ids(2, 19)
    expected = onnxruntime.OnnxRuntimeEngine(exports["per-token"]).logits(ids)
    found = engine.logits(ids)
    assert found.shape == expected.shape
    assert (found - expected).norm() <= 1e-2 * expected.norm()  # per token: chunks may fall on other roundings
    assert (found.argmax(-1) == expected.argmax(-1)).float().mean() > 0.97
    assert server.requests == [3, 4, 4, 4, 4, 1] * 2


def test_sequences_take_turns(cpu_engine: Path, served: Any, exports: dict[str, Path]) -> None:
    engine, server = served(cpu_engine)
    alone = onnxruntime.OnnxRuntimeEngine(exports["per-token"])
    prompts = [PROMPT, [9, 8, 7]]
    streams = [engine.generate(prompt, 12) for prompt in prompts]
    found = list(zip(*streams, strict=True))
    assert [list(tokens) for tokens in zip(*found, strict=True)] == [
        list(alone.generate(prompt, 12)) for prompt in prompts
    ]
    assert server.live == {}


def test_a_stream_that_is_dropped_is_forgotten(cpu_engine: Path, served: Any) -> None:
    engine, server = served(cpu_engine)
    stream = engine.generate(PROMPT, 24)
    next(stream)
    assert len(server.live) == 1
    stream.close()
    assert server.live == {}


def test_as_long_as_the_plan_holds(plan: Path, served: Any) -> None:
    """Two less than the engine's 64: the hidden position, and the request that ends the sequence."""
    engine, server = served(plan)
    assert engine.longest == 62
    sequence = engine.start(PROMPT)
    for _ in range(62 - len(PROMPT)):
        sequence.step(1)
    assert max(state.shape[2] for state in next(iter(server.live.values())).values()) == 63
    with pytest.raises(UserError, match="at most 62 tokens together"):
        next(engine.generate(PROMPT, 57))


def test_servers_that_are_not_there(cpu_engine: Path, served: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"127.0.0.1:1: no Triton server answers .*; expected HOST:PORT of its gRPC"):
        TritonEngine(cpu_engine, "127.0.0.1:1")
    _, server = served(cpu_engine)
    server.name = "another"
    with pytest.raises(UserError, match=r"no model 'int8-engine'.*--triton DIR, then start the server again"):
        TritonEngine(cpu_engine, "localhost:8001", client=server)
    for module in ("grpc", "tritonclient"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, module, None)
            with pytest.raises(MissingPackageError, match="pip install tritonclient grpcio protobuf"):
                TritonEngine(cpu_engine, "localhost:8001")


def test_what_the_server_says_is_passed_on(cpu_engine: Path, served: Any) -> None:
    engine, server = served(cpu_engine)
    sequence = engine.start(PROMPT)
    server.live.clear()  # as after a restart
    with pytest.raises(UserError, match=r"the server failed \(must specify the START flag"):
        sequence.step(1)


def test_float32_logits(cpu_engine: Path, served: Any) -> None:
    engine, _ = served(cpu_engine)
    assert engine.start(PROMPT).logits.dtype == numpy.float32
