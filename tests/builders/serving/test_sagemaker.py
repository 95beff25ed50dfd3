"""What SageMaker takes, by others' rules: vectors/create_model.json is of AWS's own client, vectors/lmi_keys.json of
djl-serving's sources. What is written for the engine is served, and asked as SageMaker asks."""

from __future__ import annotations

import configparser
import json
import re
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest

from builders.serving.sagemaker import deployment
from exporters.export import Source, export
from smoothquant.artifacts.manifest import FileFacts
from smoothquant.errors import UserError
from smoothquant.files import files_in, sha256
from smoothquant.outputs import MANIFEST, load_manifest, save_manifest
from smoothquant.settings import SmoothingSettings
from tests.builders.serving.openai.served import served
from tests.builders.serving.tensorrt_llm.test_serve_config import engine as trtllm_engine
from tests.forked import assert_one_line, smoothquant
from tests.models import hooked_absmax, open_llama, sample_ids, save_llama
from tests.writers import w8a8_writer

VECTORS = Path(__file__).parent / "vectors"
ROLE = "arn:aws:iam::123456789012:role/service-role/reads-models"
FOR = ("--for", "sagemaker")


@pytest.fixture(scope="module")
def w8a8(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("handed")
    model = save_llama(root / "model")
    source = Source(open_llama(model), SmoothingSettings(), hooked_absmax(model, sample_ids()), {"model": "m"})
    export(source, [w8a8_writer(root / "w8a8")])
    return root / "w8a8"


def check(value: Any, shape: Mapping[str, Any]) -> None:
    """A request, by the shapes of AWS's own client."""
    if "members" in shape:
        assert set(shape["required"]) <= set(value) <= set(shape["members"])
        for name, inner in value.items():
            check(inner, shape["members"][name])
    elif shape["type"] == "string":
        assert re.fullmatch(shape.get("pattern", ".*"), value)
        assert len(value) <= shape.get("max", 1024)
        assert value in shape.get("enum", [value])
    else:
        assert type(value) is {"boolean": bool, "map": dict}[shape["type"]]


def written(folder: Path, out: Path, *options: object) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the command says, and the request that it has written."""
    found = smoothquant("serve-config", folder, "--out", out, *FOR, "--json", *options)
    assert found.returncode == 0, found.stderr
    return json.loads(found.stdout), json.loads((out / "create-model.json").read_text())


def test_an_engine_is_served_as_it_is_written(engine: Path, tmp_path: Path) -> None:
    out = tmp_path / "a place"
    options = ("--s3", "s3://models/tiny", "--role", ROLE, "--image", "registry/image:1", "--name", "tiny")
    said, request = written(engine, out, *options, "--max-length", 64)
    check(request, json.loads((VECTORS / "create_model.json").read_text())["shape"])
    assert request["PrimaryContainer"]["ModelDataSource"]["S3DataSource"]["S3Uri"] == "s3://models/tiny/"
    assert (request["ExecutionRoleArn"], request["PrimaryContainer"]["Image"]) == (ROLE, "registry/image:1")
    assert said["to_fill"] == []
    assert shlex.split(said["upload"]) == ["aws", "s3", "sync", f"{out}/model", "s3://models/tiny/"]
    assert shlex.split(said["create"])[-1] == f"file://{out}/create-model.json"
    assert list(files_in(out / "model")) == list(files_in(engine))
    words = shlex.split(request["PrimaryContainer"]["Environment"]["SMOOTHQUANT_OPTIONS"])
    with served(out / "model", *words) as server, httpx.Client(base_url=server.root, timeout=60) as client:
        assert client.get("/ping").status_code == 200
        body = {"messages": [{"role": "user", "content": "Say it."}], "max_tokens": 8}
        assert client.post("/invocations", json=body).json()["model"] == "tiny"
        assert client.post("/invocations", json=body | {"model": "tiny"}).status_code == 200
        with client.stream("POST", "/invocations", json={"prompt": "a", "stream": True}) as answer:
            assert list(answer.iter_lines())[-2:] == ["data: [DONE]", ""]
        refused = client.post("/invocations", json={"prompt": "a", "max_tokens": 64})
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "context_length_exceeded")


def test_a_w8a8_folder_has_properties_that_lmi_knows(w8a8: Path, tmp_path: Path) -> None:
    said, request = written(w8a8, tmp_path / "out", "--name", "tiny", "--max-length", 256)
    assert set(said["to_fill"]) == {"ACCOUNT", "BUCKET", "REGION", "ROLE"}
    assert {"ml.g5", "ml.p4d", "ml.p5"} <= set(said["instances"])
    assert "ml.p6-b200" not in said["instances"]  # vLLM has no INT8 kernel for it
    filled = json.dumps(request).replace("ACCOUNT", "123456789012").replace("REGION", "us-west-2")
    check(json.loads(filled), json.loads((VECTORS / "create_model.json").read_text())["shape"])
    model = tmp_path / "out/model"
    assert (
        json.loads((model / "config.json").read_text())["quantization_config"]["quant_method"] == "compressed-tensors"
    )
    assert (model / "model.safetensors").read_bytes() == (w8a8 / "model.safetensors").read_bytes()
    assert not (w8a8 / "serving.properties").exists()  # that folder stays as it is

    reader = configparser.ConfigParser(delimiters=("=", ":"), comment_prefixes=("#", "!"), interpolation=None)
    reader.optionxform = str  # type: ignore[assignment, method-assign] # capitals stay
    reader.read_string("[all]\n" + (model / "serving.properties").read_text())
    found = dict(reader["all"])
    known = json.loads((VECTORS / "lmi_keys.json").read_text())
    keys = {key for place in ("keys", "passed on") for names in known[place].values() for key in names}
    assert found.keys() <= keys
    assert "option.quantize" in keys - found.keys()
    for key, values in known["values"].items():
        assert found[key] in values
    assert (found["option.served_model_name"], found["option.max_model_len"]) == ("tiny", "256")
    written(w8a8, tmp_path / "plain")
    assert "option.max_model_len" not in (tmp_path / "plain/model/serving.properties").read_text()


def without_tokenizer(folder: Path, copy: Path) -> Path:
    shutil.copytree(folder, copy)
    manifest = load_manifest(copy)
    kept = {name: facts for name, facts in manifest.files.items() if "token" not in name}
    for name in manifest.files.keys() - kept.keys():
        (copy / name).unlink()
    save_manifest(copy / MANIFEST, replace(manifest, files=kept))
    return copy


def test_folders_that_sagemaker_cannot_serve(engine: Path, w8a8: Path, tmp_path: Path) -> None:
    cuda = shutil.copytree(engine, tmp_path / "cuda")
    manifest = load_manifest(cuda)
    inputs = {"export": manifest.inputs, "content": "c", "threads": 1, "provider": "cuda"}
    save_manifest(cuda / MANIFEST, replace(manifest, step="build onnxruntime", inputs=inputs))
    other = shutil.copytree(engine, tmp_path / "other")
    save_manifest(other / MANIFEST, replace(manifest, step="build openvino"))
    windows = shutil.copytree(w8a8, tmp_path / "windows")
    changed = {"model_type": "qwen2", "sliding_window": 8, "use_sliding_window": True}
    config = json.loads((windows / "config.json").read_text()) | changed
    (windows / "config.json").write_text(json.dumps(config))
    facts = FileFacts((windows / "config.json").stat().st_size, sha256(windows / "config.json"))
    files = load_manifest(w8a8).files
    save_manifest(windows / MANIFEST, replace(load_manifest(w8a8), files={**files, "config.json": facts}))
    (tmp_path / "empty").mkdir()
    for folder, said in (
        (tmp_path / "empty", "not an output of this tool"),
        (trtllm_engine(tmp_path / "trtllm"), "not an output of this tool"),
        (cuda, "built for the provider cuda; expected an engine for a processor"),
        (other, "made by 'build openvino', which no container for SageMaker serves here"),
        (windows, "vLLM's Qwen2 has windows in every layer or in none; expected a folder that vLLM serves on a GPU"),
        (without_tokenizer(engine, tmp_path / "bare"), "it has no tokenizer, so it cannot be served"),
        (without_tokenizer(w8a8, tmp_path / "bare-w8a8"), "it has no tokenizer, so it cannot be served"),
    ):
        assert_one_line(smoothquant("serve-config", folder, "--out", tmp_path / "out", *FOR), 2, said)
    assert not (tmp_path / "out").exists()


def test_options_that_are_refused(engine: Path, tmp_path: Path) -> None:
    for words, said in (
        ((*FOR, "--name", "a_b"), "--name a_b; expected up to 63 letters"),
        ((*FOR, "--name", "a" * 64), "expected up to 63 letters"),
        ((*FOR, "--s3", "models/tiny"), "--s3 models/tiny; expected a prefix"),
        ((*FOR, "--role", "admin"), "--role admin; expected the ARN of a role"),
        ((*FOR, "--image", "a b"), "--image a b; expected the address of an image"),
        ((*FOR, "--max-length", "0"), "--max-length 0; expected 1 or more tokens"),
        ((*FOR, "--memory", "0.5"), "--memory: an option of --for triton"),
        (("--max-length", "5"), "--max-length: an option of --for sagemaker"),
    ):
        assert_one_line(smoothquant("serve-config", engine, "--out", tmp_path / "out", *words), 2, said)


def test_a_name_that_sagemaker_takes(tmp_path: Path) -> None:
    for folder, name in (("Llama 2_7b.int8", "Llama-2-7b-int8"), ("__", "model"), ("a" * 80, "a" * 63)):
        assert deployment(tmp_path / folder, None, None, None, None).name == name
    with pytest.raises(UserError):
        deployment(tmp_path, "-a", None, None, None)
