"""Validations made up of plain numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from builders.validate import Check, Validation
from builders.validate.layers import LinearError
from builders.validate.metrics import Metrics, Samples
from builders.validate.ranges import Channels, Range
from builders.validate.validation import Exactness

ROLES = ("q", "k", "v", "o", "gate", "up", "down")
INPUTS = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))


def made(label: str = "SmoothQuant", layers: int = 3, quantized: bool = True, checked: bool = True) -> Validation:
    """A validation whose numbers tell where they are from."""
    linears = [
        LinearError(n, role, f"model.layers.{n}.{role}_proj", 20 + n + 0.1 * place)
        for n in range(layers)
        for place, role in enumerate(ROLES)
    ]
    ranges = [
        Range(n, roles, 300.0 + n, 2.0, 3.0 if quantized else 300.0 + n, 1.0) for n in range(layers) for roles in INPUTS
    ]
    return Validation(
        label=label,
        subject={
            "engine": "build onnxruntime",
            "bytes": 7_400_000,
            "inputs": {"model": "0f", "activations": "per-token", "smoothing": {"alpha": 0.5, "groups": "default"}},
            "engine_versions": {},
            "checkpoint": "tiny",
            "model": "0f",
            "stored": "FP16",
            "reference": "the original checkpoint: weights as stored (FP16), arithmetic in float32",
            "text": "held-out.txt",
            "text_fingerprint": "1e",
            "sequences": 2,
            "tokens": 64,
            "versions": {"smoothquant": "0.1.0"},
        },
        metrics=Metrics(
            64, 62, 0.0107, 0.65, 0.99994, 0.000623, 0.00299, 0.9807, 0.9968, 0.0312, 0.0457, 22.01, 22.03, 1.0012
        ),
        checks=(Check("kl_mean", 0.000623, 0.01), Check("top1", 0.9807, 0.99)) if checked else (),
        exactness=Exactness(0.0039, 0.003) if quantized else None,
        linears=tuple(linears) if quantized else (),
        hidden_errors=tuple(0.01 * (n + 1) for n in range(layers)) if quantized else (),
        ranges=tuple(ranges),
        channels=Channels(1, INPUTS[0], 4, (1.0, 300.0, 2.0, 0.0), (1.0, 3.0, 2.0, 0.0)),
        samples=Samples((1e-4, 1e-3, 1e-2, 1e-1), (0, 60, 4), ((-3.0, -3.1), (2.0, 2.05), (0.0, 0.0))),
    )


@pytest.fixture
def make() -> Callable[..., Validation]:
    return made
