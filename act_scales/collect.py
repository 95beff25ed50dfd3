"""Calibration: the largest |input| and |output| of every channel of every linear over all tokens of a text, and the
mean square of its input.

`Maxima` listens to a sweep over the layers (`smoothquant.sweep`), and beside it `mean_squares.MeanSquares`, and
`float16.HeldMaxima`, to what float16 might not hold. An interrupted run goes on near where it stopped, and its file is
byte for byte what an uninterrupted one would have written.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from act_scales.mean_squares import MeanSquares
from act_scales.store import FORMAT_VERSION, INPUT, OUTPUT, ActScales, check_replaceable, load_act_scales
from act_scales.text import Text
from smoothquant.device import choose_device, choose_dtype
from smoothquant.errors import ActScalesError, OutputError, UserError
from smoothquant.float16 import HeldMaxima
from smoothquant.layers import FloatLayer, Layer
from smoothquant.listener import Listener
from smoothquant.memory import for_calibration
from smoothquant.model import Model
from smoothquant.outputs import versions
from smoothquant.quantization import absmax
from smoothquant.roles import ROUTER
from smoothquant.sweep import Progress, sweep
from smoothquant.team import ALONE, Team
from smoothquant.workspace import Workspace

FILE = "act_scales.safetensors"


def collect(
    model: Model,
    text: Text,
    out: str | Path,
    *,
    dtype: str = "auto",
    device: str = "auto",
    overwrite: bool = False,
    memory: int | None = None,
    team: Team = ALONE,
    progress: Progress = lambda done, total: None,
) -> ActScales:
    """Calibrate `model` on `text` and write the act scales file `out`; one made from the same inputs is reused.

    dtype: "auto" or the name of the dtype to compute in, device: "auto", "cpu", "cuda", "cuda:N" (see
    `smoothquant.device`). memory: the bytes that calibration may take (`smoothquant.memory`); None for a whole layer. A
    file is the same with and without it but for the last bits of sums, and counts as the same. team: those that share
    the text; all call this, and rank 0 writes the file.

    Raises UserError for a text that the model cannot read, and for too little memory, ActScalesError for NaN or Inf in
    the activations, OutputError if `out` exists with other content or cannot be written.
    """
    team.check_enough(len(text.sequences), text.source)
    out, text, device = Path(out), text.for_model(model), choose_device(device)
    compute = choose_dtype(dtype, model.checkpoint.dtype, device)
    budget = for_calibration(model, memory, max(map(len, text.sequences)), compute)
    inputs = made_from(model, text, compute, device)
    if out.suffix != ".safetensors" or out.is_dir():
        raise OutputError(f"{out} cannot be written", expected="a file NAME.safetensors", do="choose another --out")
    with Workspace(out, "calibrate", inputs, overwrite=overwrite, kind=_ActScalesFile(inputs), team=team) as work:
        if work.finished:
            return load_act_scales(out)
        maxima, held, squares = Maxima(model, compute), HeldMaxima(model), MeanSquares(model)
        end = sweep(
            model,
            text.sequences,
            [maxima, held, squares],
            dtype=compute,
            weights=compute,
            device=device,
            work=work,
            budget=budget,
            team=team,
            progress=progress,
        )
        scales = ActScales(*maxima.split(), inputs | told_of(text), held.with_head(end), squares.found)
        if team.leads:
            scales.save(work.path(FILE))
        work.commit_file(FILE)
    return scales


def made_from(model: Model, text: Text, dtype: torch.dtype, device: str) -> dict[str, str]:
    """The metadata of act scales that determine them."""
    return {
        "format_version": FORMAT_VERSION,
        "model_fingerprint": model.checkpoint.fingerprint,
        **{key: str(value) for key, value in model.choices.items()},
        "text_fingerprint": text.fingerprint,
        "samples": str(len(text.sequences)),
        "sequence_length": str(text.length),
        "tokens": str(text.tokens),
        "dtype": str(dtype).removeprefix("torch."),
        "device": device.partition(":")[0],
    }


def told_of(text: Text) -> dict[str, str]:
    """Further metadata of act scales. The fingerprint of the text tells what it begins with from others."""
    return {
        "text_source": text.source,
        "sequence_start": text.sequence_start,
        "versions": json.dumps(versions()),
    }


class Maxima(Listener):
    """Maxima of all linears, over all tokens that the layers are given. dtype: of the arithmetic."""

    def __init__(self, model: Model, dtype: torch.dtype) -> None:
        self.model, self.dtype = model, dtype
        self.found = _zeros(model)  # float32 (channels,), by their keys in the file
        self._stored = {roles[0]: (name, roles) for name, roles in model.stored.items() if roles != (ROUTER,)}

    def enter(self, source: FloatLayer) -> dict[str, Layer]:
        self._index = source.index
        self._input: dict[str, Tensor] = {}  # role -> float32 (channels,), in the order in which the linears ran
        self._output: dict[str, Tensor] = {}
        self._last: tuple[Tensor, Tensor] | None = None  # an input and its maxima: q, k and v are given the same one
        return {}

    def listen(self, role: str, x: Tensor, y: Tensor) -> None:
        if role == ROUTER:
            return
        if self._last is None or self._last[0] is not x:
            self._last = (x, _channels(x))
        _take(self._input, role, self._last[1])
        _take(self._output, role, _channels(y))

    def merge(self, team: Team) -> None:
        self._input, self._output = team.largest(self._input), team.largest(self._output)

    def leave(self) -> None:
        """Note the maxima of every matrix. Those of an expert that no token reached stay 0. Raises ActScalesError."""
        self._last = None
        for key, values in self._by_key():
            if not values.isfinite().all():  # the first bad one is where it began
                raise _overflow(key, self.dtype)
            self.found[key].copy_(values)

    @property
    def leftover(self) -> Collection[str]:
        return self._input.keys() | self._output.keys()

    def state(self) -> dict[str, Tensor]:
        return self.found

    def restore(self, state: dict[str, Tensor]) -> None:
        for key, values in self.found.items():
            values.copy_(state.pop(key))

    def split(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Maxima of the inputs and of the outputs, by module name."""
        inputs, outputs = (
            {key.removesuffix(suffix): values for key, values in self.found.items() if key.endswith(suffix)}
            for suffix in (INPUT, OUTPUT)
        )
        return inputs, outputs

    def _by_key(self) -> Iterator[tuple[str, Tensor]]:
        """What was heard, by key in the file, in the order in which the linears ran; it is forgotten here."""
        for name, roles in [self._stored[role] for role in self._input if role in self._stored]:
            full = self.model.family.module(self._index, name)
            inputs = [self._input.pop(role) for role in roles]  # one and the same
            yield full + INPUT, inputs[0]
            yield full + OUTPUT, self.model.join(name, {role: self._output.pop(role) for role in roles})


def _take(maxima: dict[str, Tensor], role: str, found: Tensor) -> None:
    maxima[role] = torch.maximum(maxima[role], found) if role in maxima else found.clone()


def _channels(x: Tensor) -> Tensor:
    """Largest magnitude of every channel. x: (..., channels); returns (channels,) float32."""
    return absmax(x.flatten(0, -2), dim=0).float()


def _zeros(model: Model) -> dict[str, Tensor]:
    """Room for all maxima, taken before the first layer.

    Allocated layer by layer, these small tensors would lie between the large ones that come and go, and keep the
    memory of those from being used again: it would grow by a fifth of a layer with every layer.
    """
    room = {}
    for name, (rows, columns) in model.linears():
        room[name + INPUT], room[name + OUTPUT] = torch.zeros(columns), torch.zeros(rows)
    return room


@dataclass(frozen=True)
class _ActScalesFile:
    """The output of a calibration with these inputs."""

    inputs: dict[str, str]

    def is_finished(self, out: Path) -> bool:
        try:
            return self.inputs.items() <= load_act_scales(out).metadata.items()
        except UserError:
            return False

    def check_replaceable(self, out: Path) -> None:
        check_replaceable(out)


def _overflow(key: str, dtype: torch.dtype) -> ActScalesError:
    name, _, side = key.rpartition(".")
    do = "ask who trained the model" if dtype == torch.float32 else "calibrate with --dtype float32"
    return ActScalesError(
        f"NaN or Inf in the {side.removesuffix('_absmax')} of {name}, the first linear to show any",
        expected=f"activations that {str(dtype).removeprefix('torch.')} can hold",
        do=do,
    )
