"""A real tritonserver serves what `serve-config` writes for a TensorRT-LLM engine: text goes in, and text comes out.

The server parses the four configs, connects the models and runs our two programs in its Python backend, with
transformers 4 as NVIDIA's container has it. Between them our interpreter computes the engine's checkpoint
(`tests.servers.triton.tensorrtllm_backend`), where NVIDIA's backend runs the engine on a GPU.
"""

from __future__ import annotations

import json
import shlex
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy
import pytest

pytest.importorskip("tritonclient.grpc")

from tritonclient import grpc

from act_scales.tokenizer import Encoder
from builders.serving.tensorrt_llm.models import REQUEST, REQUIRED
from builders.serving.tensorrt_llm.repository import request_example
from builders.tensorrt_llm.interpreter.interpreter import Interpreter
from tests import zoo
from tests.builders.serving.tensorrt_llm.test_serve_config import engine
from tests.builders.tensorrt_llm.checkpoints import PER_TOKEN, write
from tests.forked import smoothquant
from tests.servers.environments import TRITON
from tests.servers.triton.interpreter_worker import continuation
from tests.servers.triton.server import Triton

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(TRITON.python is None, reason="python -m tests.servers triton makes Triton's environment"),
]

Record = Callable[[str, object], None]

END, NEW = 257, 24
AT = 6  # the new token of the first prompt that shall end an answer, too
TYPES = {
    "TYPE_INT32": ("INT32", numpy.int32),
    "TYPE_FP32": ("FP32", numpy.float32),
    "TYPE_UINT64": ("UINT64", numpy.uint64),
}
PROMPTS = ["def f(x):", "a", "über, naïve, 模型 𝄞", " \n\t", "<s>begin", "x" * 100]
WRONG = {  # model: a change of its config.pbtxt, and what is said of it
    "a field that Triton does not know": ("ensemble", "max_batch_size", "max_batches", "failed to poll"),
    "another name": ("ensemble", 'name: "ensemble"', 'name: "other"', "failed to poll"),
    "a type between two models": (
        "tensorrt_llm",
        '"end_id"\n  data_type: TYPE_INT32',
        '"end_id"\n  data_type: TYPE_INT64',
        "data type",
    ),
    "a shape between two models": ("tensorrt_llm", "dims: 2\n  dims: -1", "dims: -1", "inconsistent shape"),
    "an output that is not there": ("ensemble", 'key: "INPUT_IDS"', 'key: "IDS"', "IDS"),
    "an input that is not there": ("ensemble", 'key: "end_id"', 'key: "end_ids"', "end_ids"),
    "an output that nobody makes": ("ensemble", 'key: "OUTPUT"', 'key: "OUT"', "OUT"),
    "a model that is not there": ("ensemble", 'model_name: "tensorrt_llm"', 'model_name: "llm"', "llm"),
    "a parameter of the backend": ("tensorrt_llm", "guided_decoding_backend", "guided", "guided_decoding_backend"),
}


@dataclass(frozen=True)
class Served:
    """A server with the ensemble. stop: the second token that ends an answer."""

    triton: Triton
    engine: Path
    repository: Path
    stop: int

    @cached_property
    def interpreter(self) -> Interpreter:
        return Interpreter(self.engine / "checkpoint")

    @cached_property
    def encoder(self) -> Encoder:
        return Encoder(self.engine)

    def expected(self, prompt: str, count: int = NEW) -> str:
        """The text that our interpreter continues a prompt with."""
        ids = self.encoder.tokenizer(prompt)["input_ids"]
        tokens = continuation(self.interpreter, ids, count, [[END], [self.stop]])
        return self.encoder.tokenizer.decode(tokens, skip_special_tokens=True)

    def ask(self, *prompts: str, **numbers: float) -> list[str]:
        """The answers of the ensemble to prompts in one request. numbers: inputs of the ensemble."""
        texts = grpc.InferInput("text_input", [len(prompts), 1], "BYTES")
        texts.set_data_from_numpy(numpy.array([[prompt.encode()] for prompt in prompts], dtype=object))
        inputs = [texts]
        for name, number in ({"max_tokens": NEW} | numbers).items():
            kind, dtype = TYPES[REQUEST[name][1]]
            inputs.append(grpc.InferInput(name, [len(prompts), 1], kind))
            inputs[-1].set_data_from_numpy(numpy.full((len(prompts), 1), number, dtype))
        found = self.triton.client.infer("ensemble", inputs, client_timeout=60).as_numpy("text_output")
        assert found.shape == (len(prompts), 1)
        return [text.decode() for text in found[:, 0]]

    def last_request(self) -> dict[str, Any]:
        """What the backend was asked last."""
        return json.loads((self.engine / "requests.jsonl").read_text().splitlines()[-1])


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    root = tmp_path_factory.mktemp("served")
    folder, repository = engine(root / "engine"), root / "repository"
    (folder / "checkpoint").mkdir()
    write(zoo.build("llama"), folder / "checkpoint", PER_TOKEN)
    ids = Encoder(folder).tokenizer(PROMPTS[0])["input_ids"]
    stop = continuation(Interpreter(folder / "checkpoint"), ids, AT)[-1]
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [END, stop]}))
    found = smoothquant("serve-config", folder, "--out", repository)
    assert found.returncode == 0, found.stderr
    with Triton([repository], tmp_path_factory.mktemp("triton")) as triton:
        assert triton.load("ensemble") is None
        yield Served(triton, folder, repository, stop)


def test_text_to_text(served: Served, record_property: Record) -> None:
    """One after another, all in one request, and more requests at once than the engine takes in one step."""
    expected = [served.expected(prompt) for prompt in PROMPTS]
    assert [served.ask(prompt) for prompt in PROMPTS] == [[text] for text in expected]
    assert served.ask(*PROMPTS) == expected
    with ThreadPoolExecutor(24) as pool:
        assert list(pool.map(served.ask, PROMPTS * 8)) == [[text] for text in expected] * 8
    record_property("triton", ["`serve-config`", "READY; text through its four models", "our interpreter's text"])


def test_an_answer_ends_at_every_end_token(served: Served) -> None:
    """Of generation_config.json too, which the backend gets as a stop word."""
    ids = served.encoder.tokenizer(PROMPTS[0])["input_ids"]
    assert len(continuation(served.interpreter, ids, NEW)) == NEW  # without end tokens
    assert len(continuation(served.interpreter, ids, NEW, [[served.stop]])) <= AT
    assert served.ask(PROMPTS[0]) == [served.expected(PROMPTS[0])]
    asked = served.last_request()
    assert (asked["end_id"], asked["stop_words_list"]) == ([END], [[[served.stop], [1]]])


def test_every_input_reaches_the_backend(served: Served) -> None:
    """Under the name and in the type of NVIDIA's backend; what is not given is not sent."""
    given = {name: 3 + n for n, name in enumerate(REQUEST)}
    served.ask("a", **given)
    asked = served.last_request()
    assert {theirs: [given[name]] for name, (theirs, _) in REQUEST.items()}.items() <= asked.items()
    served.ask("a")
    left_out = {theirs for name, (theirs, _) in REQUEST.items() if name != REQUIRED}
    assert asked.keys() - served.last_request().keys() == left_out


@pytest.mark.parametrize(("endpoint", "head"), [("generate", ""), ("generate_stream", "data: ")])
def test_the_command_that_is_printed(endpoint: str, head: str, served: Served) -> None:
    """Its body, at its path; the server has other ports here."""
    _, place, _, body = shlex.split(request_example(PROMPTS[0]))
    path = place.removeprefix("localhost:8000").replace("generate", endpoint)
    with urllib.request.urlopen(f"http://{served.triton.http}{path}", body.encode(), timeout=60) as found:
        answer = found.read().decode().strip()
    assert answer.startswith(head)
    asked = json.loads(body)
    assert json.loads(answer.removeprefix(head))["text_output"] == served.expected(PROMPTS[0], asked["max_tokens"])


def test_a_bad_request_is_its_own_error(served: Served) -> None:
    """Among good ones."""
    with ThreadPoolExecutor(8) as pool:
        found = [pool.submit(served.ask, prompt) for prompt in ["", "a"] * 8]
    expected = served.expected("a")
    for number, answer in enumerate(found):
        if number % 2:
            assert answer.result() == [expected]
        else:
            with pytest.raises(grpc.InferenceServerException, match="preprocessing: the prompt has no tokens"):
                answer.result()


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_config_is_refused(name: str, served: Served) -> None:
    """The control."""
    model, old, new, reason = WRONG[name]
    path = served.repository / model / "config.pbtxt"
    text = path.read_text()
    assert old in text
    try:
        path.write_text(text.replace(old, new))
        said = served.triton.load(model) or served.triton.load("ensemble")
    finally:
        path.write_text(text)
        assert served.triton.load("ensemble") is None
    assert said is not None
    assert reason in said
