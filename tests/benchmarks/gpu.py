"""What only a GPU can tell, as a table: a column per kind of GPU, "not measured" where nobody has.

`docker/tensorrt/gpu_check.sh` fills results/tensorrt_sm80.json (A100) and tensorrt_sm90.json (H100):
{"gpu", "driver", "versions", "command", "measured": {row: text}}.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from smoothquant.files import write_json
from smoothquant.outputs import versions
from tests.benchmarks.results import FOLDER
from tests.gpu.outcomes import NOTE, record

FORMS: Mapping[str, dict] = {  # of the bundled model's exports
    "float": {"activations": "float"},
    "per-token": {"activations": "per-token"},
    "per-token fp16": {"activations": "per-token", "body": "fp16"},
    "per-token bf16": {"activations": "per-token", "body": "bf16"},
    "per-tensor": {"activations": "per-tensor"},
    "per-tensor fp16": {"activations": "per-tensor", "body": "fp16"},
    "int8 head": {"activations": "per-token", "lm_head": "int8"},
    "int8 kv": {"activations": "per-token", "kv": "int8"},
    "fp16, cache in place": {"activations": "per-token", "body": "fp16", "capacity": 128},  # TensorRT >= 10.15
}
SIZES = (1024, 4096, 11008)  # input channels
PHASES = ("prefill", "decode")
QUICK = ("W8A8, float head", "W8A8, INT8 head")
COLUMNS = {"sm80": "A100", "sm90": "H100"}
GPU_CHECK = "docker/tensorrt/gpu_check.sh"


def engine(form: str) -> str:
    return f"INT8 kernels, and logits beside ONNX Runtime's: {form}"


def speed(phase: str, label: str) -> str:
    return f"{phase}, {label}, against FP16"


def overflow(inner: int) -> str:
    return f"one product of {inner} channels, float16 scales"


ROWS = (
    *map(engine, FORMS),
    *(speed(phase, label) for label in QUICK for phase in PHASES),
    *map(overflow, SIZES),
)


def note(kind: str, gpu: str, measured: Mapping[str, str]) -> None:
    """Add to the results of one kind of GPU. kind: "sm80"; gpu: its name; measured: by `ROWS`."""
    assert measured.keys() <= set(ROWS), measured.keys() - set(ROWS)
    for row, text in measured.items():
        record(row, NOTE, text)
    found = {"gpu": gpu, "command": GPU_CHECK, "versions": versions(), "measured": {**_known(kind), **measured}}
    FOLDER.mkdir(exist_ok=True)
    write_json(FOLDER / f"tensorrt_{kind}.json", found)


def table() -> str:
    """Markdown."""
    known = {kind: _known(kind) for kind in COLUMNS}
    lines = [f"| | {' | '.join(COLUMNS.values())} |", "|---" * (1 + len(COLUMNS)) + "|"]
    lines += [f"| {row} | {' | '.join(found.get(row, 'not measured') for found in known.values())} |" for row in ROWS]
    for kind in COLUMNS:
        if known[kind]:
            found = _read(kind)
            packages = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
            lines += ["", f"* {found['gpu']}: `{found['command']}` ({packages})"]
    return "\n".join(lines) + "\n"


def _known(kind: str) -> dict[str, str]:
    return _read(kind).get("measured", {})


def _read(kind: str) -> dict:
    path = FOLDER / f"tensorrt_{kind}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
