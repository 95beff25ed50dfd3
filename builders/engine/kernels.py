"""The checks of a build that has run an ONNX graph once: finite logits, and an integer kernel for each product."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy

from smoothquant.errors import UserError

FUSES = ("x86_64", "amd64")  # processors for which both runtimes of ONNX graphs have the integer kernels


@dataclass(frozen=True)
class IntegerKernels:
    """integer: the number of products that are integer kernels; quantized: the number that should be."""

    integer: int
    quantized: int


def check_logits(folder: Path, logits: numpy.ndarray) -> None:
    """Raise UserError if a logit of the graph in `folder` is NaN or infinite."""
    if not numpy.isfinite(logits).all():
        raise UserError(
            f"{folder}: the graph gives logits that are not finite",
            expected="finite logits",
            do="export with --dtype fp32, or validate the float model first",
        )


def check_kernels(folder: Path, runtime: str, kernels: IntegerKernels, do: str, lost: Sequence[str] = ()) -> None:
    """Raise UserError if a product did not become an integer kernel, on processors that have one for each.

    runtime: who made the kernels. do: what a user can do. lost: the products that run in float, where they are known.
    """
    if kernels.integer != kernels.quantized and platform.machine().lower() in FUSES:
        which = f" ({', '.join(lost[:3])}{', ...' if lost[3:] else ''} in float)" if lost else ""
        raise UserError(
            f"{folder}: {runtime} made {kernels.integer} integer kernels{which}",
            expected=f"{kernels.quantized}, one for each quantized matrix product",
            do=do,
        )
