"""Integer products that saturate at 16 bits are found out, by our own imitation and on an emulated processor."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy
import onnx
import pytest

from builders.engine.saturation import check_exact
from builders.onnxruntime.session import run_product
from smoothquant.artifacts.ports import MODEL
from smoothquant.errors import UserError

EMULATOR = shutil.which("qemu-x86_64")  # of Debian's qemu-user, from 7.2 on
EMULATED = """
import json, sys
sys.path[:0] = json.loads(sys.argv[1])
from builders.engine.saturation import check_exact
from builders.openvino import graph
from builders.onnxruntime import session
from smoothquant.errors import UserError
def with_settings(folder, x):  # the emulator shows the flags of the processor that it runs on
    session.SETTINGS.update(session.settings({"avx2"}))
    return session.run_product(folder, x)
for run in (session.run_product, with_settings, graph.run_product):
    try:
        check_exact("it", run, "")
        print("exact")
    except UserError as error:
        print(error)
"""


def pairs_in_16_bits(folder: Path, x: numpy.ndarray) -> numpy.ndarray:
    """What AVX2 makes of the product: u8 by s8, pairs summed in 16 bits; the offset of u8 is taken off again."""
    model = onnx.load(folder / MODEL)
    [weight] = [onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer if tensor.name == "weight"]
    products = (x.astype(numpy.int64) + 128)[:, :, None] * weight.astype(numpy.int64)
    pairs = numpy.clip(products[:, ::2] + products[:, 1::2], -(2**15), 2**15 - 1)
    return (pairs.sum(axis=1) - 128 * weight.sum(axis=0, dtype=numpy.int64)).astype(numpy.float32)


def test_sums_of_16_bits_are_refused() -> None:
    with pytest.raises(UserError, match=r"a runtime: its INT8 products saturate at 16 bits .*; do this") as no:
        check_exact("a runtime", pairs_in_16_bits, "do this")
    assert "\n" not in str(no.value)


def test_exact_products_pass() -> None:
    check_exact("ONNX Runtime", run_product, "")


@pytest.mark.skipif(EMULATOR is None, reason="no qemu-x86_64, which runs a processor without VNNI")
def test_a_processor_without_vnni() -> None:
    """Haswell: ONNX Runtime is exact with our settings for AVX2, and only with them; OpenVINO saturates."""
    python = Path(sys.executable).resolve()  # no link of an environment's, which it would take for its own
    command = [str(EMULATOR), "-cpu", "Haswell", str(python), "-c", EMULATED, json.dumps(sys.path)]
    found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=600).stdout.splitlines()
    assert [line == "exact" for line in found] == [False, True, False]
