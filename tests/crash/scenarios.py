"""What is interrupted: small runs of the real command line, each in a folder of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

MODEL, TEXT, HELDOUT, SCALES = "MODEL", "TEXT", "HELDOUT", "SCALES"  # made once, read only
ONNX, TRTLLM, INT8 = "ONNX", "TRTLLM", "INT8"
CALIBRATE = ("calibrate", MODEL, "--text", TEXT, "--samples", "4", "--length", "16", "--device", "cpu")

SEARCH = ("search", MODEL, "--text", TEXT, "--samples", "8", "--length", "16", "--device", "cpu")

VALIDATE = (
    *("validate", ONNX, TRTLLM, "--reference", MODEL, "--text", TEXT, "--samples", "4", "--length", "16"),
    *("--report", "report.html", "--out", "report.json", "--device", "cpu"),
)


@dataclass(frozen=True)
class Scenario:
    """name: on the command line. command: what is interrupted; what it makes lies in the folder where it runs. before:
    a command that makes what this one overwrites. mapped: hidden states lie in mapped files. ranks: processes that
    share the command. resumed: numbers of processes that go on from an interruption, each from the same one. batch:
    tokens that go through a layer together."""

    name: str
    command: Sequence[str]
    before: Sequence[str] = ()
    mapped: bool = False
    ranks: int = 1
    resumed: Sequence[int] = (1,)
    batch: int | None = None


def _export(kind: str, *options: str) -> tuple[str, ...]:
    return ("export", kind, MODEL, SCALES, "--out", "out", *options)


def _both(name: str, command: Sequence[str], other: Sequence[str]) -> tuple[Scenario, Scenario]:
    """The command alone, and where it overwrites the output of another one."""
    return Scenario(name, command), Scenario(f"{name}-overwrite", (*command, "--overwrite"), other)


def _team(name: str, command: Sequence[str], resumed: Sequence[int] = (1, 2)) -> Scenario:
    """The command in two processes, with a batch of two sequences each."""
    return Scenario(name, command, ranks=2, resumed=resumed, batch=32)


SEVERAL = (
    *("export", "--target", "w8a8", "--target", "onnx:act=both,dtype=fp16,lm-head=int8", "--target", "trtllm:pp=2"),
    *(MODEL, SCALES),
)
RUN = (
    *("run", "tiny-llama", "--model", MODEL, "--text", TEXT, "--heldout", HELDOUT, "--out", "out"),
    *("--samples", "4", "--length", "64"),
)
SCENARIOS = {
    scenario.name: scenario
    for scenario in (
        *_both(
            "calibrate",
            (*CALIBRATE, "--out", "out.safetensors"),
            (*CALIBRATE, "--dtype", "bfloat16", "--out", "out.safetensors"),
        ),
        Scenario("calibrate-mapped", (*CALIBRATE, "--out", "out.safetensors"), mapped=True),
        _team("calibrate-team", (*CALIBRATE, "--out", "out.safetensors")),
        _team("search-team", (*SEARCH, "--out", "out")),
        *_both("hf", _export("hf"), _export("hf", "--alpha", "0.3")),
        *_both("w8a8", _export("w8a8"), _export("w8a8", "--alpha", "0.3")),
        *_both("onnx", _export("onnx", "--act", "both", "--lm-head", "int8", "--kv", "int8"), _export("w8a8")),
        *_both("trtllm", _export("trtllm", "--kv", "int8", "--tp", "1", "--pp", "2"), _export("trtllm")),
        *_both("several", (*SEVERAL, "--out", "out"), (*SEVERAL, "--out", "out", "--alpha", "0.3")),
        *_both("convert", ("convert", INT8, "--to", "compressed-tensors", "--out", "out"), _export("w8a8")),
        *_both(
            "build",
            ("build", "onnxruntime", ONNX, "--out", "out", "--triton", "repository"),
            _export("w8a8"),
        ),
        Scenario("validate", VALIDATE),
        _team("validate-team", VALIDATE, resumed=(2,)),  # one process would add sums up in another order
        *_both(
            "run",
            (*RUN, "--target", "onnxruntime", "--target", "tensorrt-llm"),
            (*RUN, "--target", "tensorrt-llm", "--alpha", "0.3"),
        ),
    )
}
