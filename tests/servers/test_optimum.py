"""optimum's ORTModelForCausalLM, in its own environment, generates our engine's tokens in a batch.

It sizes the empty cache by the model's type, not by the graph's inputs. Where that is wrong (Mixtral and Phi-3, which
it gives a key for every query; a head_dim that is not hidden_size / heads), ONNX Runtime refuses the cache.
"""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from builders import onnxruntime
from builders.engine.generation import end_tokens
from builders.onnxruntime import OnnxRuntimeEngine
from exporters.export import export
from smoothquant.outputs import load_manifest
from tests import zoo
from tests.families.case import Case
from tests.servers.environments import OPTIMUM
from tests.servers.quantizers import ENVIRONMENT
from tests.writers import onnx_writer

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(OPTIMUM.python is None, reason="python -m tests.servers optimum makes it"),
]
PROMPTS = ([5, 6, 7, 40, 41, 9, 120, 33], [90, 7, 7], [12, 200, 31, 4, 77])
NEW = 12
GROUPED = ("gemma3_text", "granite", "llama", "mistral", "qwen2", "qwen3", "qwen3_moe")  # whose kv heads it reads


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("optimum")
    found = {}
    for layout in zoo.ZOO:
        case = Case(layout, root / layout)
        export(case.source, [onnx_writer(root / f"{layout}.onnx")])
        onnxruntime.build(root / f"{layout}.onnx", root / f"{layout}.engine")
        found[layout] = root / f"{layout}.engine"
    return found


@pytest.fixture(scope="module")
def answers(engines: dict[str, Path]) -> dict[str, dict]:
    """What one process of optimum says of all engines."""
    jobs = [{"folder": str(folder), "prompts": PROMPTS, "new": NEW} for folder in engines.values()]
    found = subprocess.run(
        [str(OPTIMUM.python), str(Path(__file__).with_name("optimum_worker.py"))],
        input=json.dumps({"jobs": jobs}),
        capture_output=True,
        text=True,
        check=False,
        env=ENVIRONMENT,
    )
    assert found.returncode == 0, found.stderr[-2000:]
    return dict(zip(engines, map(json.loads, found.stdout.splitlines()), strict=True))


def alone(folder: Path) -> list[list[int]]:
    """Our own greedy tokens behind each prompt, which never end."""
    engine, ends = OnnxRuntimeEngine(folder), sorted(end_tokens(folder))
    found = []
    for prompt in PROMPTS:
        decoding = engine.start(prompt)
        tokens: list[int] = []
        while len(tokens) < NEW:
            logits = decoding.logits
            logits[ends] = -math.inf
            tokens.append(int(logits.argmax()))
            decoding.step(tokens[-1])
        found.append(tokens)
    return found


def assumed_cache(config: dict) -> tuple[int, int]:
    """The heads and channels of the cache that optimum's modeling_decoder.py assumes."""
    kind, heads = config["model_type"], config.get("num_attention_heads") or config["n_head"]
    size = config["head_dim"] if kind == "gemma3_text" else config["hidden_size"] // heads
    if kind == "falcon":
        grouped = config["new_decoder_architecture"] or not config["multi_query"]
        return config["num_kv_heads"] if grouped else 1, size
    return config["num_key_value_heads"] if kind in GROUPED else heads, size


@pytest.mark.parametrize("layout", zoo.ZOO)
def test_it_generates_our_tokens(
    layout: str,
    answers: dict[str, dict],
    engines: dict[str, Path],
    record_property: Callable[[str, object], None],
) -> None:
    folder, answer = engines[layout], answers[layout]
    facts, assumed = load_manifest(folder).facts, assumed_cache(json.loads((folder / "config.json").read_text()))
    if assumed == (facts.kv_heads, facts.head_dim):
        assert answer == {"tokens": alone(folder)}
        record_property("optimum", [layout, "our tokens"])
    else:
        assert "Got invalid dimensions for input: past_key_values." in answer["failed"]
        words = "{} kv heads of {} channels".format
        record_property(
            "optimum", [layout, f"refused: it assumes {words(*assumed)}, not {words(facts.kv_heads, facts.head_dim)}"]
        )
