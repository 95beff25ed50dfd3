"""What reports say of an export."""

from __future__ import annotations

from dataclasses import fields, replace

from smoothquant.artifacts.manifest import HuggingFaceOptions, OnnxOptions, Origin, TrtllmOptions
from smoothquant.scheme import scheme_of
from smoothquant.settings import SmoothingSettings

STATIC = scheme_of("per-tensor", kv_cache="int8", float_linears=("a", "b"))
ORIGIN = Origin("llama", SmoothingSettings(), (scheme_of("per-token"),), model="m", act_scales="a")
UNUSUAL = SmoothingSettings(0.7, "run-time", "float16", cache="shared")


def test_words() -> None:
    assert list(ORIGIN.words().items()) == [
        ("model", "m"),
        ("act_scales", "a"),
        ("family", "llama"),
        ("smoothing", {"alpha": 0.5, "groups": "default"}),
        ("activations", "per-token"),
        ("weights", "per-channel"),
        ("kv_cache", "float"),
        ("head", "float"),
    ]
    steps = ({"name": "borrow-ranges"}, {"name": "clip-rows", "quantile": 0.9, "times": 2})
    more = replace(ORIGIN, schemes=(STATIC,), steps=steps, max_positions=64, onnx=OnnxOptions("fp32", 21))
    assert list(more.words().items()) == [
        ("model", "m"),
        ("act_scales", "a"),
        ("family", "llama"),
        ("max_positions", 64),
        ("smoothing", {"alpha": 0.5, "groups": "default"}),
        ("activations", "per-tensor"),
        ("weights", "per-channel"),
        ("kv_cache", "int8"),
        ("head", "float"),
        ("float_linears", ["a", "b"]),
        ("steps", ["borrow-ranges", "clip-rows quantile 0.9 times 2"]),
        ("body", "fp32"),
        ("opset", 21),
    ]


def test_no_setting_is_left_out() -> None:
    """Each field, changed, changes the words, those that nobody has thought of yet too."""
    for each in fields(SmoothingSettings):
        changed = replace(SmoothingSettings(), **{each.name: getattr(UNUSUAL, each.name)})
        told = replace(ORIGIN, smoothing=changed).words()["smoothing"]
        assert told[each.name] == getattr(UNUSUAL, each.name)
    full = Origin(
        "opt",
        UNUSUAL,
        (STATIC,),
        ({"name": "borrow-ranges"},),
        model="n",
        act_scales="b",
        max_positions=64,
        onnx=OnnxOptions("fp16", 17),
        trtllm=TrtllmOptions("algo", "float16", 2, 1, "1.2.1"),
        hf=HuggingFaceOptions("float32"),
    )
    for each in fields(Origin):
        changed = replace(ORIGIN, **{each.name: getattr(full, each.name)})
        assert (changed.words() == ORIGIN.words()) == (changed == ORIGIN), each.name
