"""Writers by the words of the command line, as tables of options spell them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from exporters.huggingface import W8A8Writer
from exporters.onnx import OnnxWriter
from recipes.cli.export.onnx import BOTH
from smoothquant.scheme import scheme_of


def onnx_writer(
    out: Path,
    activations: str = "per-token",
    body: str = "fp32",
    *,
    lm_head: str = "float",
    kv: str = "float",
    embedding: str = "float",
    kept: Sequence[str] = (),
    kind: type[OnnxWriter] = OnnxWriter,
    **options: Any,
) -> OnnxWriter:
    """The writer of `export onnx`. kept: linears that static forms leave in float; kind: its class."""
    forms = BOTH if activations == "both" else (activations,)
    schemes = [scheme_of(form, kv_cache=kv, head=lm_head, embedding=embedding) for form in forms]
    held = [replace(one, float_linears=tuple(kept)) if one.activations.static else one for one in schemes]
    return kind(out, *held, body=body, **options)


def w8a8_writer(out: Path, activations: str = "per-token", kept: Sequence[str] = ()) -> W8A8Writer:
    """The writer of `export w8a8`."""
    return W8A8Writer(out, scheme_of(activations, float_linears=tuple(kept)))
