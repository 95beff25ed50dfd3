"""Compare two engines or folders with each other on one text, without the model that they were made from.

The first takes the place of the reference in `builders.validate.metrics`. An engine computes the logits of one sequence
after another. A Hugging Face folder, in float or in INT8, runs all sequences through one of its layers after another,
so that a layer is in memory, and not the model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from builders.engine.generation import GeneratingEngine
from builders.engine.protocol import FOREIGN, ForeignInputs
from builders.engine.table import engine_manifest, open_engine
from builders.validate.metrics import Comparison, Metrics, check_logits
from builders.validate.reference import HeldOutText, check_text
from smoothquant import decoder
from smoothquant.errors import UserError
from smoothquant.int8_layer import int8_layer
from smoothquant.int8_model import Int8Model
from smoothquant.model import Model
from smoothquant.outputs import check_content
from smoothquant.sweep import Progress, sweep

Sizes = dict[str, int]  # by their names in config.json


class Runner(Protocol):
    """One of two engines or folders. label: its name in tables. nbytes: its size on disk. model: the fingerprint of the
    model that it is or was made from; None if that is not known. sizes: those of the model."""

    label: str
    nbytes: int
    model: str | None
    sizes: Sizes

    def start(self, text: HeldOutText, progress: Progress) -> None:
        """Get ready for the text. progress: called with (layers done, all layers), if layers are run.

        Raises UserError for a text that does not suit the model."""

    def logits(self, sequence: int) -> Tensor:
        """The logits of a sequence of the text, float32 (tokens, vocab)."""
        ...


class EngineRunner(Runner):
    """An engine's folder. Raises UserError if it is none, or does not run here."""

    def __init__(self, label: str, folder: Path) -> None:
        self.label, self.folder, manifest = label, folder, engine_manifest(folder)
        check_content(folder, manifest)
        self.nbytes = manifest.nbytes
        if manifest.step == FOREIGN:
            found = manifest.inputs_as(ForeignInputs)
            self.model = None
            self.sizes = _sizes(found.vocab_size, found.hidden_size, found.num_hidden_layers)
        else:
            self.model, facts = manifest.origin.model, manifest.facts
            self.sizes = _sizes(facts.vocab_size, facts.hidden_size, facts.layers)

    def start(self, text: HeldOutText, progress: Progress) -> None:
        self.text, self.engine = text, open_engine(self.folder)
        if isinstance(self.engine, GeneratingEngine):
            self.engine.check_length(max(map(len, text.sequences)))

    def logits(self, sequence: int) -> Tensor:
        ids = self.text.sequences[sequence]
        logits = self.engine.logits(ids[None])
        check_logits(logits, len(ids), self.sizes["vocab_size"], sequence)
        return logits[0]


class FolderRunner(Runner):
    """A Hugging Face folder that our decoder runs: a float model, in float32, or an INT8 folder, in W8A8."""

    def __init__(self, label: str, found: Model | Int8Model, device: str) -> None:
        self.label, self.device = label, device
        self.opened = found if isinstance(found, Model) else found.model
        self._layer = None if isinstance(found, Model) else lambda index: int8_layer(found, index)
        checkpoint, geometry = self.opened.checkpoint, self.opened.geometry
        self.nbytes = sum(path.stat().st_size for path in checkpoint.files)
        self.model = checkpoint.fingerprint if isinstance(found, Model) else None
        self.sizes = _sizes(geometry.vocab_size, geometry.hidden_size, geometry.layers)

    def start(self, text: HeldOutText, progress: Progress) -> None:
        check_text(self.opened, text)
        self._end = sweep(self.opened, text.sequences, device=self.device, stored=self._layer, progress=progress)

    @torch.no_grad()
    def logits(self, sequence: int) -> Tensor:
        hidden = self._end.states(sequence)
        logits = decoder.logits(self.opened, hidden[None].to(self.device)).cpu()
        check_logits(logits, len(hidden), self.sizes["vocab_size"], sequence)
        return logits[0]


@dataclass(frozen=True)
class SideBySide:
    """The comparison of two runners. metrics: of the second, with the first in the place of the reference. kl_back: the
    mean KL(second || first), in nats per token."""

    labels: tuple[str, str]
    nbytes: tuple[int, int]
    metrics: Metrics
    kl_back: float

    def as_dict(self) -> dict[str, Any]:
        """All fields as JSON values. "reference" in the metrics stands for the first runner."""
        return asdict(self)


def compare_runners(
    first: Runner, second: Runner, text: HeldOutText, progress: Callable[[int, int], None] = lambda done, total: None
) -> SideBySide:
    """The comparison of two runners on a text.

    progress: called with (done, total), counted in layers of both and sequences.
    Raises UserError for models of different sizes and for a text that does not suit them, ThresholdError for logits
    that are not finite.
    """
    check_sizes(first, second)
    layers = first.sizes["num_hidden_layers"]
    total = 2 * layers + len(text.sequences)
    first.start(text, lambda done, _: progress(done, total))
    second.start(text, lambda done, _: progress(layers + done, total))
    tokens = sum(map(len, text.sequences))
    there, back = Comparison(tokens), Comparison(tokens)
    for sequence, ids in enumerate(text.sequences):
        one, other = (runner.logits(sequence) for runner in (first, second))
        there.add(one, other, ids)
        back.add(other, one, ids)
        progress(2 * layers + sequence + 1, total)
    return SideBySide(
        (first.label, second.label), (first.nbytes, second.nbytes), there.metrics(), back.metrics().kl_mean
    )


def check_sizes(first: Runner, second: Runner) -> None:
    """Raise UserError for two models of different sizes."""
    for name, number in first.sizes.items():
        if second.sizes[name] != number:
            raise UserError(
                f"{second.label}: its model has {name} {second.sizes[name]}",
                expected=f"{number}, as {first.label} has",
                do="compare what was made from one model",
            )


def _sizes(vocab_size: int, hidden_size: int, layers: int) -> Sizes:
    return {"vocab_size": vocab_size, "hidden_size": hidden_size, "num_hidden_layers": layers}
