"""Texts of protocol buffers: whatever is written is what protobuf's own parser reads, as Triton's ModelConfig."""

from __future__ import annotations

import os
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

pytest.importorskip("tritonclient.grpc")

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from builders.serving.pbtxt import Line, Name, dumps, entries, parameters
from builders.serving.triton.config import DecoderModel, ModelTensor, config
from smoothquant.errors import UserError

texts = st.text(st.characters(exclude_categories=["Cs"]))  # all but lone surrogates


def parse(text: str) -> Any:
    return text_format.Parse(text, model_config_pb2.ModelConfig())


@given(texts)
@example("a \"b\" 'c' \\ \\n \n\r\t\0\x1f\x7f\x85\u2028 ü 模 𝄞")
@example("\x001")  # a digit behind an octal escape
@example('" } name: "')
@example("\\")
def test_any_string_comes_back(text: str) -> None:
    config = parse(dumps({"name": text, "parameters": parameters({text: text}), "max_batch_size": 3}, [text]))
    assert (config.name, config.max_batch_size) == (text, 3)
    assert {key: value.string_value for key, value in config.parameters.items()} == {text: text}


@given(name=texts, notes=st.lists(texts))
@example(name="k", notes=['a note\nbackend: "another"', "a\0b", "", "# again"])
def test_any_name_comes_back_from_triton(name: str, notes: list[str]) -> None:
    tensors = [ModelTensor(name, "int64", (1, -1)), ModelTensor(f"past_key_values.{name}", "float32", (-1, 2, -1, 16))]
    found = parse(
        config(
            DecoderModel(
                name,
                tensors,
                [ModelTensor(name, "float32", (1, -1, 9)), ModelTensor(f"present.{name}", "float32", (-1, 2, -1, 16))],
                gpu=True,
                accelerator=(name, {name: name}),
                parameters={name: name},
                notes=notes,
            )
        )
    )
    [accelerator] = found.optimization.execution_accelerators.gpu_execution_accelerator
    [state] = found.sequence_batching.state
    assert (found.backend, accelerator.name, dict(accelerator.parameters)) == (name, name, {name: name})
    assert [tensor.name for tensor in (*found.input, *found.output)] == [name, name]
    assert (state.input_name, state.output_name) == (f"past_key_values.{name}", f"present.{name}")
    assert {key: value.string_value for key, value in found.parameters.items()} == {name: name}


def test_how_it_looks() -> None:
    message = {
        "backend": "b",
        "input": [Line(name="x", dims=[1, -1])],
        "instance_group": {"kind": Name("KIND_CPU")},
        "model_transaction_policy": {"decoupled": False},
        "metric_tags": entries({"k": "v"}),
    }
    text = dumps(message, ["one\ntwo"])
    assert text == (
        '# one\n# two\nbackend: "b"\ninput { name: "x" dims: 1 dims: -1 }\ninstance_group {\n  kind: KIND_CPU\n}\n'
        'model_transaction_policy {\n  decoupled: false\n}\nmetric_tags {\n  key: "k"\n  value: "v"\n}\n'
    )
    assert parse(text).metric_tags == {"k": "v"}


def test_a_string_that_utf8_cannot_hold() -> None:
    """As Python has the name of a file that is not in UTF-8."""
    with pytest.raises(UserError, match=r"'caf\\udce9': not a text in UTF-8"):
        dumps({"name": os.fsdecode(b"caf\xe9")})
