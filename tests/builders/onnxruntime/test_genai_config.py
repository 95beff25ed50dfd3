"""genai_config.json holds what onnxruntime-genai reads. That it runs: test_generate.py."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest

from builders.onnxruntime.genai import genai_config
from builders.onnxruntime.session import SETTINGS
from smoothquant.artifacts.ports import LOGITS_TO_KEEP
from smoothquant.errors import UserError
from smoothquant.machine import physical_cores
from tests.outputs import facts


def written(folder: Path) -> dict:
    return json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("form", ["float", "per-token"])
def test_keys_and_values(form: str, engines: dict[str, Path]) -> None:
    assert written(engines[form]) == {
        "model": {
            "type": "decoder",
            "vocab_size": 288,
            "context_length": 512,
            "bos_token_id": 256,
            "eos_token_id": 257,
            "pad_token_id": 257,
            "decoder": {
                "filename": "model.onnx",
                "session_options": {"intra_op_num_threads": physical_cores(), **SETTINGS},
                "head_size": 16,
                "hidden_size": 64,
                "num_attention_heads": 4,
                "num_hidden_layers": 2,
                "num_key_value_heads": 2,
                "inputs": {
                    "input_ids": "input_ids",
                    "attention_mask": "attention_mask",
                    "position_ids": "position_ids",
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        # the graph grows its cache: past and present never share a buffer
        "search": {"max_length": 512, "past_present_share_buffer": False},
    }


def test_names_are_the_graphs(engines: dict[str, Path]) -> None:
    graph = onnx.load(engines["float"] / "model.onnx", load_external_data=False).graph
    decoder = written(engines["float"])["model"]["decoder"]
    wanted = [value for value in graph.input if value.name != LOGITS_TO_KEEP]  # genai leaves it away
    for named, values in ((decoder["inputs"], wanted), (decoder["outputs"], graph.output)):
        names = {name % layer if "%d" in name else name for name in named.values() for layer in (0, 1)}
        assert names == {value.name for value in values}


def test_tokens_are_those_of_the_configs(tmp_path: Path) -> None:
    """Several ends, as Llama 3 has; none at all; and those that only config.json names."""
    geometry = facts(8, None)
    (tmp_path / "config.json").write_text(json.dumps({"bos_token_id": 3}))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    model = genai_config(tmp_path, geometry, threads=3)["model"]
    assert (model["bos_token_id"], model["eos_token_id"], model["pad_token_id"]) == (3, [7, 9], 7)
    assert model["decoder"]["session_options"]["intra_op_num_threads"] == 3

    (tmp_path / "generation_config.json").unlink()
    assert not {"eos_token_id", "pad_token_id"} & genai_config(tmp_path, geometry, threads=3)["model"].keys()
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": []}))
    assert not {"eos_token_id", "pad_token_id"} & genai_config(tmp_path, geometry, threads=3)["model"].keys()
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ["7"]}))
    with pytest.raises(UserError, match=r'generation_config.json: eos_token_id is \["7"\]; expected a token id'):
        genai_config(tmp_path, geometry, threads=3)
