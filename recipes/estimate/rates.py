"""What this machine does in a second, measured within some seconds by the functions that the steps themselves use."""

from __future__ import annotations

import errno
import hashlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from act_scales.collect import Maxima
from act_scales.mean_squares import MeanSquares
from recipes.estimate.hollow import seconds_beside_products
from recipes.estimate.sizes import ModelSizes, Tokens
from smoothquant import files
from smoothquant.announced import AnnouncedCheckpoint
from smoothquant.batches import BATCH_TOKENS
from smoothquant.contract import TOKENS
from smoothquant.device import choose_dtype
from smoothquant.float16 import HeldMaxima
from smoothquant.fold import SmoothedLayer
from smoothquant.layers import FloatLayer, float_linear
from smoothquant.listener import Listener
from smoothquant.machine import physical_cores
from smoothquant.quantization import absmax, is_finite, w8a8_linear
from smoothquant.scheme import PER_TOKEN
from smoothquant.stream import QuantizingLayer

NUMBERS = 1 << 23  # of a matrix that a rate is measured with: 32 MB in float32
HASHED, WRITTEN = 64 << 20, 128 << 20  # bytes
AT_LEAST = 0.2  # seconds that are measured
LONGEST = 2048  # tokens of a sequence that is measured
FP32 = torch.float32


@dataclass(frozen=True)
class Rate:
    """One measured rate. how: it was measured, in words."""

    value: float
    unit: str
    how: str


@dataclass(frozen=True)
class Rates:
    """What this machine does.

    compute: the dtype of a calibration's arithmetic. products: FLOP/s of float products in that dtype and in float32,
    and int8: of W8A8 products. beside: seconds for a token in a layer apart from products, with the listeners of a
    calibration, and plain: without, in float32. quantize: weights/s that are smoothed, checked against the contract and
    quantized. take: bytes/s of weights that are copied from the page cache, checked for NaN and widened. sha256, read,
    write: bytes/s. cached: whether `read` comes from the page cache, since the system let no file go from there.
    cores: physical ones.
    """

    compute: torch.dtype
    products: Mapping[torch.dtype, float]
    int8: float
    beside: float
    plain: float
    quantize: float
    take: float
    sha256: float
    read: float
    write: float
    cached: bool
    read_from: str
    cores: int

    def table(self) -> Mapping[str, Rate]:
        """Every rate by its name, with how it was measured."""
        shapes = f"at the model's shapes, {BATCH_TOKENS} tokens"
        found = {
            f"products in {_name(dtype)}": Rate(value, "FLOP/s", f"{shapes}, cut to {NUMBERS:,} weights")
            for dtype, value in self.products.items()
        }
        where = f"{self.read_from}, {'cached by the system' if self.cached else 'beyond the page cache'}"
        return found | {
            "products in int8": Rate(self.int8, "FLOP/s", f"{shapes}, inputs quantized per token"),
            "all but products": Rate(
                1 / self.beside, "token-layers/s", f"a layer without weights, {_name(self.compute)}"
            ),
            "the same, not listened to": Rate(1 / self.plain, "token-layers/s", "float32"),
            "smooth, check, quantize": Rate(self.quantize, "weights/s", f"one matrix, {TOKENS} tokens of the contract"),
            "take up weights": Rate(self.take, "B/s", "copied, checked for NaN, widened"),
            "SHA-256": Rate(self.sha256, "B/s", "in memory"),
            "read": Rate(self.read, "B/s", where),
            "write": Rate(self.write, "B/s", f"{WRITTEN >> 20} MB and fsync, in the folder of --out"),
        }


def measure_rates(sizes: ModelSizes, text: Tokens, place: Path) -> Rates:
    """Measure everything. text: of the calibration. place: a folder on the disk of the output, in which a file is
    written and deleted."""
    compute = choose_dtype("auto", sizes.dtype, "cpu")
    write, read, cached = _disk(place)
    read_from = "what was just written"
    if not isinstance(sizes.model.checkpoint, AnnouncedCheckpoint):
        last = max(sizes.model.checkpoint.files, key=lambda file: file.stat().st_size)
        read, cached = _reading(last)
        read_from = last.name
    model = sizes.model
    listeners = (Maxima(model, compute), HeldMaxima(model), MeanSquares(model))
    matrices = _matrices(sizes)
    return Rates(
        compute=compute,
        products={dtype: _products(matrices, dtype) for dtype in dict.fromkeys((compute, FP32))},
        int8=_int8(matrices),
        beside=_beside(sizes, text, compute, listeners),
        plain=_beside(sizes, text, FP32),
        quantize=_quantizing(sizes),
        take=_taking(sizes, compute),
        sha256=_hashing(),
        read=read,
        write=write,
        cached=cached,
        read_from=read_from,
        cores=physical_cores(),
    )


def _beside(sizes: ModelSizes, text: Tokens, dtype: torch.dtype, listeners: Sequence[Listener] = ()) -> float:
    """`seconds_beside_products`. Of longer sequences than `LONGEST`, by a line through two lengths: attention takes the
    longer for each token, the more tokens there are before it."""
    if text.length <= LONGEST:
        return seconds_beside_products(sizes, text, dtype, listeners)
    half, whole = (
        seconds_beside_products(sizes, Tokens(1, length), dtype, listeners) for length in (LONGEST // 2, LONGEST)
    )
    return whole + max(0.0, whole - half) * (text.length - LONGEST) / (LONGEST - LONGEST // 2)


def _matrices(sizes: ModelSizes) -> list[Tensor]:
    """For each width of an input a matrix, float32 (out, in), cut to `NUMBERS`."""
    tallest: dict[int, int] = {}
    for out, into in sizes.shapes.values():
        tallest[into] = max(out, tallest.get(into, 0))
    return [torch.randn(min(out, max(1, NUMBERS // into)), into) * 0.02 for into, out in tallest.items()]


def _products(matrices: Sequence[Tensor], dtype: torch.dtype) -> float:
    """FLOP/s of a float linear."""
    pairs = [(torch.randn(BATCH_TOKENS, one.shape[1]).to(dtype), one.to(dtype)) for one in matrices]
    return _flops(matrices) / _seconds(lambda: [float_linear(x, weight, None) for x, weight in pairs])


def _int8(matrices: Sequence[Tensor]) -> float:
    """FLOP/s of a W8A8 linear."""
    activations = PER_TOKEN.activations
    pairs = [(torch.randn(BATCH_TOKENS, one.shape[1]), (one * 1000).to(torch.int8)) for one in matrices]
    scales = [torch.ones(len(one)) for one in matrices]

    def run() -> None:
        for (x, weight), scale in zip(pairs, scales, strict=True):
            w8a8_linear(x, weight, scale, activations)

    return _flops(matrices) / _seconds(run)


def _flops(matrices: Sequence[Tensor]) -> int:
    return sum(2 * BATCH_TOKENS * one.numel() for one in matrices)


def _quantizing(sizes: ModelSizes) -> float:
    """Weights/s that an export smooths, checks and quantizes: the stored and the smoothed product of the contract's
    tokens, the maxima that scales are chosen by, and the rounding."""
    role = max(sizes.shapes, key=lambda role: sizes.shapes[role][0] * sizes.shapes[role][1])
    out, into = sizes.shapes[role]
    weight = (torch.randn(min(out, max(1, NUMBERS // into)), into) * 0.02).to(sizes.dtype)
    source = FloatLayer(0, {role: weight}, {}, {})
    layer = SmoothedLayer(sizes.model, 0, source, {}, {role: torch.ones(into)}, column={role: torch.ones(into)})
    x = torch.randn(TOKENS, into)

    def run() -> None:
        absmax(weight, dim=0)
        source.linear(role, x)
        QuantizingLayer(layer, [PER_TOKEN.weights], lambda rows: None).linear(role, x)

    return weight.numel() / _seconds(run)


def _taking(sizes: ModelSizes, dtype: torch.dtype) -> float:
    """Bytes/s of weights, as they are stored, that are taken into memory once the system has read them."""
    checkpoint, rows = sizes.model.checkpoint, NUMBERS // sizes.geometry.hidden_size
    name = sizes.model.on_disk(f"{sizes.model.linear(0, 'q')}.weight")
    stored = torch.randn(rows, sizes.geometry.hidden_size).to(sizes.dtype)
    here = not isinstance(checkpoint, AnnouncedCheckpoint)
    nbytes = (checkpoint.read(name, slice(0, rows)) if here else stored).nbytes

    def read() -> Tensor:
        return checkpoint.read(name, slice(0, rows)) if here else stored.clone()

    def run() -> None:
        found = read()
        is_finite(found)
        found.to(dtype)

    return nbytes / _seconds(run)


def _hashing() -> float:
    content = bytes(HASHED)
    return HASHED / _seconds(lambda: hashlib.sha256(content).digest())


def _disk(place: Path) -> tuple[float, float, bool]:
    """Bytes/s that are written and synced, and read again, in a file that is deleted; whether that was cached."""
    content = memoryview(os.urandom(WRITTEN >> 4) * 16)
    with files.scratch(place) as folder:
        path = folder / "written"
        begin = time.perf_counter()
        files.DISK.write(path, [(0, content)], new=True)
        files.DISK.sync(path)
        written = WRITTEN / (time.perf_counter() - begin)
        return (written, *_reading(path))


def _reading(path: Path) -> tuple[float, bool]:
    """Bytes/s of the end of a file, which the system is asked to drop from its cache first; whether it has kept it."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        end = os.fstat(descriptor).st_size
        at = start = max(0, end - WRITTEN)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(descriptor, start, end - start, os.POSIX_FADV_DONTNEED)
        cached = _is_cached(descriptor, (start + end) // 2)
        begin = time.perf_counter()
        while at < end:
            at += len(os.pread(descriptor, files.CHUNK, at)) or end
        return max(1, end - start) / (time.perf_counter() - begin), cached
    finally:
        os.close(descriptor)


def _is_cached(descriptor: int, at: int) -> bool:
    """Whether a byte of a file can be had without the disk."""
    try:
        return bool(os.preadv(descriptor, [bytearray(1)], at, os.RWF_NOWAIT))
    except (AttributeError, OSError) as error:
        return getattr(error, "errno", None) != errno.EAGAIN


def _seconds(run: Callable[[], object]) -> float:
    """Seconds of one run, in the best of some."""
    run()
    best, began = float("inf"), time.perf_counter()
    while time.perf_counter() - began < AT_LEAST:
        begin = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - begin)
    return best


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
