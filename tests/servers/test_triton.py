"""A real tritonserver serves what `build onnxruntime --triton` and `build tensorrt --triton` write.

The server parses every config.pbtxt, refuses a wrong one, and schedules the sequences. ONNX Runtime computes behind it
(`tests.servers.triton.onnx_backend`), where NVIDIA's backends do on a GPU. Without a GPU the server takes no instance
on one, so where a config asks for that, its copy here asks for the CPU.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from threading import Barrier

import pytest

pytest.importorskip("tritonclient.grpc")

from builders import onnxruntime
from builders.onnxruntime import OnnxRuntimeEngine
from builders.serving.triton import TritonEngine, write_model
from builders.serving.triton.config import IDLE_MICROSECONDS
from builders.tensorrt import hardware
from builders.tensorrt.build import build as build_tensorrt
from smoothquant.errors import UserError
from tests.builders.tensorrt import fake
from tests.families.case import Case
from tests.forked import assert_one_line, smoothquant
from tests.models import sample_ids
from tests.servers.environments import TRITON
from tests.servers.triton.server import Triton

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(TRITON.python is None, reason="python -m tests.servers triton makes Triton's environment"),
]

Record = Callable[[str, object], None]

PROMPT = "def f(x):"
SLOTS = 16
NEW = 24  # tokens
ENGINES = {  # engine -> the form of its export, and the provider that it was built for
    "int8-engine": ("per-token", "cpu"),
    "static-engine": ("per-tensor", "cpu"),
    "float16-engine": ("per-token fp16", "cuda"),
    "compiled-engine": ("per-token", "tensorrt"),
    "plan-engine": ("per-token", "build tensorrt"),
}
ON_GPU = [name for name, (_, provider) in ENGINES.items() if provider != "cpu"]
WRONG = {  # a change of a config.pbtxt, and what is said of it. (The server itself crashes at some faults of a state.)
    "a field that Triton does not know": ("max_batch_size", "max_batches", "failed to poll from model repository"),
    "another backend": ('"onnxruntime"', '"onnxruntime2"', "unable to find backend library"),
    "another vocabulary": ("dims: 288", "dims: 289", "outputs: the config has logits"),
    "another type": ('"input_ids" data_type: TYPE_INT64', '"input_ids" data_type: TYPE_FP32', "config has input_ids"),
    "another name": ('"position_ids"', '"positions"', "the config has position_ids None"),
    "a state without its output": ('"present.0.key"', '"present.9.key"', "the config has present.0.key None"),
}


@dataclass(frozen=True)
class Served:
    """A server of all these engines. root: of their folders, by name."""

    triton: Triton
    root: Path
    repository: Path
    case: Case

    def text(self, name: str) -> Path:
        return self.repository / name / "config.pbtxt"

    def alone(self, name: str) -> OnnxRuntimeEngine:
        """The engine on this machine."""
        return OnnxRuntimeEngine(self.case.export(ENGINES[name][0]))

    def open(self, name: str, timeout: float = 60) -> TritonEngine:
        return TritonEngine(self.root / name, self.triton.grpc, timeout)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    root = tmp_path_factory.mktemp("served")
    case, repository = Case("llama", root / "case"), root / "repository"
    made = ("build", "onnxruntime", case.export("per-token"), "--out", root / "int8-engine", "--triton", repository)
    found = smoothquant(*made)
    assert found.returncode == 0, found.stderr
    with pytest.MonkeyPatch.context() as patched:
        build = sys.modules["builders.onnxruntime.build"]
        patched.setattr(build, "check_available", lambda provider: None)
        patched.setattr(build, "_check", lambda *_: {"integer": 0, "quantized": 8})
        patched.setitem(sys.modules, "tensorrt", fake.module())
        patched.setattr(hardware, "find_gpu", fake.FakeGpu)
        for name, (form, provider) in list(ENGINES.items())[1:]:
            if provider == "build tensorrt":
                build_tensorrt(case.export(form), root / name, {"length": 64, "chunk": 4})
            else:
                onnxruntime.build(case.export(form), root / name, provider=provider)
            write_model(root / name, repository)
    shutil.copytree(root / "int8-engine", root / "two-slots")
    write_model(root / "two-slots", repository)
    with Triton([repository], tmp_path_factory.mktemp("triton")) as triton:
        yield Served(triton, root, repository, case)


@pytest.fixture(scope="module")
def int8(served: Served) -> Served:
    """`served`, with int8-engine loaded."""
    assert served.triton.load("int8-engine") is None
    return served


def prompts(count: int) -> list[list[int]]:
    return sample_ids(count, 9).tolist()


def edited(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


@contextmanager
def other(path: Path, old: str, new: str) -> Iterator[None]:
    """A file is another one for a while."""
    text = path.read_text()
    edited(path, old, new)
    yield
    path.write_text(text)


# -- configs -----------------------------------------------------------------------------------------------------------


def test_generate_prints_what_the_engine_does(int8: Served, record_property: Record) -> None:
    """By the real command line, with and without the server."""
    asked = ("generate", int8.root / "int8-engine", PROMPT, "--max-new-tokens", NEW, "--json", "--quiet")
    alone, there = smoothquant(*asked), smoothquant(*asked, "--triton", int8.triton.grpc)
    assert (alone.returncode, there.returncode, there.stderr) == (0, 0, "")
    tokens = [json.loads(found.stdout)["tokens"] for found in (alone, there)]
    assert len(tokens[0]) == NEW
    assert tokens[0] == tokens[1]
    record_property("triton", ["`build onnxruntime --triton`", "READY; `generate --triton`", f"the {NEW} tokens alone"])


@pytest.mark.parametrize("name", [name for name in ENGINES if name != "int8-engine"])
def test_tokens_are_the_engines(name: str, served: Served, record_property: Record) -> None:
    if name in ON_GPU:
        said = served.triton.load(name)
        assert said is not None
        assert "has kind KIND_GPU but no GPUs are available" in said  # nothing else is amiss
        edited(served.text(name), "KIND_GPU", "KIND_CPU")
    assert served.triton.load(name) is None
    engine, alone = served.open(name), served.alone(name)
    for prompt in prompts(3):
        assert list(engine.generate(prompt, NEW)) == list(alone.generate(prompt, NEW))
    form, provider = ENGINES[name]
    what = (
        "`build tensorrt --triton`" if name == "plan-engine" else f"`build onnxruntime --provider {provider}`, {form}"
    )
    record_property("triton", [what, "READY; three prompts", f"the engine's {NEW} tokens alone"])


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_config_is_refused(name: str, served: Served) -> None:
    """The control."""
    old, new, reason = WRONG[name]
    with other(served.text("int8-engine"), old, new):
        said = served.triton.load("int8-engine")
    assert said is not None
    assert reason in said


def test_a_state_cannot_begin_empty(int8: Served, record_property: Record) -> None:
    """Why a cache begins with a hidden position: a dimension of 0 becomes 1, else the mask would not fit the cache."""
    with other(int8.text("int8-engine"), "dims: 1 dims: 16 zero_data", "dims: 0 dims: 16 zero_data"):
        assert int8.triton.load("int8-engine") is None
        first = next(int8.open("int8-engine").generate([1, 2, 3], 1))
    assert int8.triton.load("int8-engine") is None
    assert first == next(int8.alone("int8-engine").generate([1, 2, 3], 1))
    record_property("triton", ["an `initial_state` of 0 positions", "the first request", "the cache has 1 position"])


# -- sequences ---------------------------------------------------------------------------------------------------------


def test_as_many_sequences_as_slots(int8: Served, record_property: Record) -> None:
    """They take turns, token by token. One more waits until one has ended."""
    engine, alone = int8.open("int8-engine"), int8.alone("int8-engine")
    streams = [engine.generate(prompt, NEW) for prompt in prompts(SLOTS)]
    found = [[next(stream)] for stream in streams]
    with pytest.raises(UserError, match="the server has not answered for 1 seconds"):
        next(int8.open("int8-engine", timeout=1).generate([1, 2, 3], NEW))
    for _ in range(NEW - 1):
        for tokens, stream in zip(found, streams, strict=True):
            tokens.extend(islice(stream, 1))  # none, if the sequence has ended
    for stream in streams:
        stream.close()
    assert found == [list(alone.generate(prompt, NEW)) for prompt in prompts(SLOTS)]
    assert len({tuple(tokens) for tokens in found}) == SLOTS
    assert list(engine.generate([1, 2, 3], NEW)) == list(alone.generate([1, 2, 3], NEW))
    record_property("triton", [f"{SLOTS} sequences", "a token of each in turn", "each the tokens that it has alone"])


def test_more_clients_than_slots(int8: Served, record_property: Record) -> None:
    """All at once, each with a connection of its own."""
    count, alone = 40, int8.alone("int8-engine")
    together = Barrier(count)

    def client(prompt: list[int]) -> list[int]:
        engine = int8.open("int8-engine")
        together.wait(60)
        return list(engine.generate(prompt, NEW))

    with ThreadPoolExecutor(count) as pool:
        found = list(pool.map(client, prompts(count)))
    assert found == [list(alone.generate(prompt, NEW)) for prompt in prompts(count)]
    record_property("triton", [f"{count} clients, {SLOTS} slots", "all at once", "each the tokens that it has alone"])


def test_a_client_that_vanishes(served: Served, record_property: Record) -> None:
    """Killed in mid-sequence. Here there are two slots, and it is forgotten after five seconds, not ten minutes."""
    path = served.text("two-slots")
    edited(path, f"idle_microseconds: {IDLE_MICROSECONDS}", "idle_microseconds: 5000000")
    edited(path, f"max_candidate_sequences: {SLOTS}", "max_candidate_sequences: 2")
    assert served.triton.load("two-slots") is None
    alone = served.alone("int8-engine")
    second, third = prompts(2)
    dying = generating(served.root / "two-slots", served.triton)
    dying.kill()
    assert dying.wait(20) == -signal.SIGKILL
    living = served.open("two-slots").start(second)
    waiting = served.open("two-slots", timeout=1)
    with pytest.raises(UserError, match="the server has not answered for 1 seconds"):
        waiting.start(third)  # the dead one's slot is not free yet
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(lambda: list(served.open("two-slots").generate(third, NEW)))
        tokens = []
        while not coming.done() or len(tokens) < NEW:  # the living one goes on, and so is not forgotten
            tokens.append(int(living.logits.argmax()))
            living.step(tokens[-1])
            time.sleep(0.05)
        assert coming.result() == list(alone.generate(third, NEW))
    assert tokens == list(alone.generate(second, len(tokens)))
    living.close()
    record_property(
        "triton",
        ["a client that is killed", "another waits for its slot", "free after `max_sequence_idle`; the rest go on"],
    )


def test_what_the_server_says(int8: Served) -> None:
    """Of another port of its, a model that is not loaded, and a sequence that it has forgotten."""
    with pytest.raises(UserError, match="no Triton server answers"):
        TritonEngine(int8.root / "int8-engine", int8.triton.http)
    shutil.copytree(int8.root / "int8-engine", int8.root / "not-served")
    with pytest.raises(UserError, match="this server has no model 'not-served'"):
        int8.open("not-served")
    sequence = int8.open("int8-engine").start([1, 2, 3])
    int8.triton.client.unload_model("int8-engine")
    with pytest.raises(UserError, match=r"the server failed \(.*unknown model: 'int8-engine'"):
        sequence.step(4)
    assert int8.triton.load("int8-engine") is None
    with pytest.raises(UserError, match=r"the server failed \(.* must specify the START flag"):
        sequence.step(4)


def test_a_server_that_is_killed(served: Served, tmp_path: Path, record_property: Record) -> None:
    """In mid-sequence."""
    with Triton([served.repository], tmp_path) as triton:
        assert triton.load("int8-engine") is None
        client = generating(served.root / "int8-engine", triton)
        triton.kill()
        _, said = client.communicate(timeout=60)
    found = subprocess.CompletedProcess([], client.returncode, "", said)
    assert_one_line(found, 2, f"{triton.grpc}: the server failed (")
    record_property("triton", ["a server that is killed", "`generate --triton` in mid-sequence", "one line, status 2"])


def generating(engine: Path, triton: Triton) -> subprocess.Popen[str]:
    """A command that generates, after its first character."""
    command = [sys.executable, "-m", "recipes.cli", "generate", engine, PROMPT, "--max-new-tokens", "500", "--quiet"]
    process = subprocess.Popen(
        [*map(str, command), "--triton", triton.grpc], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert PROMPT in process.stdout.readline()
    assert process.stdout.read(1)
    return process
