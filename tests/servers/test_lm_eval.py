"""lm-evaluation-harness measures, by OpenAI's protocol, the perplexity that `validate` measures."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from act_scales.text import load_text
from recipes import tiny_llama
from recipes.families import open_model
from tests.builders.serving.openai.served import served
from tests.forked import smoothquant
from tests.servers.environments import LM_EVAL

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(LM_EVAL.python is None, reason="python -m tests.servers lm-eval makes its environment"),
]
TASK = Path(__file__).parent / "lm_eval_rows"
SAMPLES, LENGTH = 8, 128
TOLERANCE = 1e-6  # the same products in another order; a token more or less would be seen


def save_numbers(folder: Path, vocabulary: int) -> None:
    """A tokenizer whose words are token ids: "12 7" is [12, 7]."""
    words = {str(token): token for token in range(vocabulary)} | {"<none>": vocabulary}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<none>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<none>").save_pretrained(folder)


def perplexity(engine: Path, rows: Sequence[Sequence[int]], vocabulary: int, scratch: Path) -> float:
    """What lm-evaluation-harness measures of rows of token ids, asking a server of an engine."""
    scratch.mkdir(exist_ok=True)
    save_numbers(scratch / "numbers", vocabulary)
    (scratch / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    with served(engine) as server:
        given = {
            "model": engine.name,
            "base_url": f"{server.url}/completions",
            "tokenizer": str(scratch / "numbers"),
            "tokenizer_backend": "huggingface",
            "max_length": max(map(len, rows)) + 1,
            "num_concurrent": 2,
            "max_retries": 1,
        }
        words = ["run", "--model", "local-completions", "--tasks", "rows", "--include_path", str(TASK)]
        words += ["--model_args", ",".join(f"{name}={value}" for name, value in given.items())]
        words += ["--batch_size", "2", "--output_path", str(scratch / "found.json")]
        found = subprocess.run(
            [str(LM_EVAL.python), "-m", "lm_eval", *words],
            env=os.environ | {"HF_HUB_OFFLINE": "1", "SMOOTHQUANT_ROWS": str(scratch / "rows.json"), "PYTHONPATH": ""},
            cwd=scratch,
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
    assert found.returncode == 0, found.stderr
    [written] = scratch.glob("**/found*.json")
    results = json.loads(written.read_text(encoding="utf-8"))["results"]["rows"]
    return next(value for name, value in results.items() if name.startswith("token_perplexity,"))


def test_the_perplexity_is_that_of_validate(tmp_path: Path) -> None:
    scales, engine, found = tmp_path / "act_scales.safetensors", tmp_path / "engine", tmp_path / "found.json"
    calibration = ("--text", tiny_llama.CALIBRATION_TEXT, "--samples", 8, "--length", 128)
    evaluation = ("--text", tiny_llama.EVALUATION_TEXT, "--samples", SAMPLES, "--length", LENGTH)
    for words in (
        ("calibrate", tiny_llama.PATH, *calibration, "--out", scales),
        ("export", "onnx", tiny_llama.PATH, scales, "--out", engine),
        ("validate", engine, "--reference", tiny_llama.PATH, *evaluation, "--no-thresholds", "--out", found),
    ):
        said = smoothquant(*words)
        assert said.returncode == 0, said.stderr
    [validation] = json.loads(found.read_text(encoding="utf-8"))["validations"]
    vocabulary = open_model(tiny_llama.PATH).geometry.vocab_size
    rows = [row.tolist() for row in load_text(tiny_llama.EVALUATION_TEXT, tiny_llama.PATH, SAMPLES, LENGTH).sequences]
    measured = perplexity(engine, rows, vocabulary, tmp_path / "straight")
    assert abs(measured / validation["metrics"]["perplexity"] - 1) < TOLERANCE
    control = [[row[0], *reversed(row[1:])] for row in rows]
    assert measured * 2 < perplexity(engine, control, vocabulary, tmp_path / "control")
