"""Calibration: the largest |input| and |output| of every channel of every linear, over all tokens of a text.

    hidden <- embedding of all tokens
    for each layer:  read it -> run all sequences through it, listening to its linears -> forget it

In memory: one layer, and beside it the hidden states of all sequences (tokens x hidden, in the compute dtype). From
time to time both maxima and hidden states go to the workspace; an interrupted run goes on there, and its file is
byte for byte what an uninterrupted one would have written.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from act_scales.machine import choose_device, choose_dtype
from act_scales.store import FORMAT_VERSION, INPUT, OUTPUT, ActScales, load_act_scales
from act_scales.text import Text
from smoothquant import decoder
from smoothquant.attention import Patterns, patterns
from smoothquant.errors import ActScalesError, OutputError, UserError
from smoothquant.family import ROUTER
from smoothquant.layers import float_layer
from smoothquant.model import Model
from smoothquant.quantization import absmax
from smoothquant.workspace import Workspace, versions

BATCH_TOKENS = 1024  # tokens in one matrix product: enough to be efficient, few enough to be small beside a layer
KEEP_EVERY = 20.0  # seconds of work that an interruption may cost, beside the layer under way
FILE = "act_scales.safetensors"

Progress = Callable[[int, int], None]  # (done, total) layers


@torch.no_grad()
def collect(
    model: Model,
    text: Text,
    out: str | Path,
    *,
    dtype: str = "auto",
    device: str = "auto",
    overwrite: bool = False,
    progress: Progress = lambda done, total: None,
) -> ActScales:
    """Calibrate `model` on `text` and write the act scales file `out`; one made from the same inputs is reused.

    dtype: "auto" or the name of the dtype to compute in, device: "auto", "cpu", "cuda", "cuda:N" (see
    `act_scales.machine`). Raises UserError for a text that the model cannot read, ActScalesError for NaN or Inf in
    the activations, OutputError if `out` exists with other content or cannot be written.
    """
    out, text, device = Path(out), text.for_model(model), choose_device(device)
    compute = choose_dtype(dtype, model.checkpoint.dtype, device)
    inputs = {
        "format_version": FORMAT_VERSION,
        "model_fingerprint": model.checkpoint.fingerprint,
        **{key: str(value) for key, value in model.choices.items()},
        "text_fingerprint": text.fingerprint,
        "samples": str(len(text.sequences)),
        "sequence_length": str(text.length),
        "tokens": str(text.tokens),
        "dtype": str(compute).removeprefix("torch."),
        "device": device.partition(":")[0],
    }
    if out.suffix != ".safetensors" or out.is_dir():
        raise OutputError(f"{out} cannot be written", expected="a file NAME.safetensors", do="choose another --out")
    made = _made_before(out, inputs)
    if made:
        progress(model.geometry.layers, model.geometry.layers)
        return made
    with Workspace(out, "calibrate", inputs, overwrite=overwrite) as work:
        maxima = _run(model, text, work, compute, device, progress)
        told = {"text_source": text.source, "versions": json.dumps(versions())}
        scales = ActScales(*_split(maxima), metadata=inputs | told)
        scales.save(work.path(FILE))
        work.commit_file(FILE)
    return scales


class Maxima:
    """Running maxima of one layer: `listen` is its linears' listener.

    input, output: role -> float32 (channels,), in the order in which the linears ran.
    """

    def __init__(self) -> None:
        self.input: dict[str, Tensor] = {}
        self.output: dict[str, Tensor] = {}
        self._last: tuple[Tensor, Tensor] | None = None  # an input and its maxima: q, k and v are given the same one

    def listen(self, role: str, x: Tensor, y: Tensor) -> None:
        if self._last is None or self._last[0] is not x:
            self._last = (x, _channels(x))
        self._take(self.input, role, self._last[1])
        self._take(self.output, role, _channels(y))

    @staticmethod
    def _take(maxima: dict[str, Tensor], role: str, found: Tensor) -> None:
        maxima[role] = torch.maximum(maxima[role], found) if role in maxima else found.clone()


def _channels(x: Tensor) -> Tensor:
    """Largest magnitude of every channel. x: (..., channels); returns (channels,) float32."""
    return absmax(x.flatten(0, -2), dim=0).float()


@dataclass(frozen=True)
class _Batch:
    """Sequences of one length that run together. rows: their tokens among all."""

    rows: slice
    length: int


def _run(
    model: Model, text: Text, work: Workspace, dtype: torch.dtype, device: str, progress: Progress
) -> dict[str, Tensor]:
    """All maxima, float32, by their keys in the file."""
    layers, batches = model.geometry.layers, list(_batches(text))
    work.require(text.tokens * model.geometry.hidden_size * dtype.itemsize)
    maxima = work.state()
    start = work.next_layer if maxima else 0
    if not maxima:
        maxima = _zeros(model)
        positions = torch.cat([torch.arange(len(sequence)) for sequence in text.sequences])
        maxima["hidden"] = decoder.embed(model, torch.cat(text.sequences)[None], dtype, positions[None])[0]
    hidden = maxima.pop("hidden")
    longest = patterns(model, text.length, dtype, device)
    progress(start, layers)
    kept = time.monotonic()
    for index in range(start, layers):
        for key, values in _layer(model, index, hidden, batches, longest, device).items():
            maxima[key].copy_(values)
        if time.monotonic() - kept > KEEP_EVERY and index + 1 < layers:
            work.mark(index + 1, {"hidden": hidden, **maxima})
            kept = time.monotonic()
        progress(index + 1, layers)
    return maxima


def _layer(
    model: Model, index: int, hidden: Tensor, batches: list[_Batch], longest: Patterns, device: str
) -> dict[str, Tensor]:
    """Maxima of one layer; `hidden` (tokens, hidden) moves on to the next layer in place."""
    maxima = Maxima()
    layer = float_layer(model, index, hidden.dtype, device, maxima.listen)
    for batch in batches:
        before = hidden[batch.rows].view(-1, batch.length, model.geometry.hidden_size).to(device)
        after = decoder.forward(model, layer, before, longest.upto(batch.length))
        hidden[batch.rows] = after.flatten(0, 1)
    found = {}
    for name, roles in _in_order(model, maxima):  # the first bad one is where it began
        full = model.family.module(index, name)
        output = model.join(name, {role: maxima.output[role] for role in roles})
        for key, values in ((full + INPUT, maxima.input[roles[0]]), (full + OUTPUT, output)):
            if not values.isfinite().all():
                raise _overflow(key, hidden.dtype)
            found[key] = values
    return found


def _in_order(model: Model, maxima: Maxima) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Matrices on disk with the roles of their linears, in the order in which they ran. The router is none of them,
    nor is an expert that no token reached: its maxima stay 0."""
    stored = {roles[0]: (name, roles) for name, roles in model.stored.items() if roles != (ROUTER,)}
    yield from (stored[role] for role in maxima.input if role in stored)


def _zeros(model: Model) -> dict[str, Tensor]:
    """Room for all maxima, taken before the first layer.

    Allocated layer by layer, these small tensors would lie between the large ones that come and go, and keep the
    memory of those from being used again: it would grow by a fifth of a layer with every layer.
    """
    room = {}
    for name, (rows, columns) in model.linears():
        room[name + INPUT], room[name + OUTPUT] = torch.zeros(columns), torch.zeros(rows)
    return room


def _batches(text: Text) -> Iterator[_Batch]:
    start = 0
    for length, group in groupby(len(sequence) for sequence in text.sequences):
        end = start + length * len(list(group))
        step = length * max(1, BATCH_TOKENS // length)
        for begin in range(start, end, step):
            yield _Batch(slice(begin, min(begin + step, end)), length)
        start = end


def _split(maxima: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    inputs, outputs = (
        {key.removesuffix(suffix): values for key, values in maxima.items() if key.endswith(suffix)}
        for suffix in (INPUT, OUTPUT)
    )
    return inputs, outputs


def _made_before(out: Path, inputs: dict[str, str]) -> ActScales | None:
    """The act scales in `out`, if they were made from these inputs."""
    try:
        scales = load_act_scales(out)
    except UserError:
        return None
    return scales if inputs.items() <= scales.metadata.items() else None


def _overflow(key: str, dtype: torch.dtype) -> ActScalesError:
    name, _, side = key.rpartition(".")
    do = "ask who trained the model" if dtype == torch.float32 else "calibrate with --dtype float32"
    return ActScalesError(
        f"NaN or Inf in the {side.removesuffix('_absmax')} of {name}, the first linear to show any",
        expected=f"activations that {str(dtype).removeprefix('torch.')} can hold",
        do=do,
    )
