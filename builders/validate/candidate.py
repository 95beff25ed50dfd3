"""Compare an engine with the reference, sequence after sequence."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from builders.engine.protocol import ANYBODY, FOREIGN, Engine, ForeignInputs
from builders.validate.advice import advice
from builders.validate.layers import LinearError
from builders.validate.metrics import Comparison, check_logits
from builders.validate.overflow import SHOWN, overflow
from builders.validate.ranges import activation_ranges
from builders.validate.reference import Reference
from builders.validate.scheme import EngineScheme
from builders.validate.thresholds import Thresholds
from builders.validate.validation import Exactness, Validation, worst_of
from smoothquant.artifacts.manifest import Manifest
from smoothquant.errors import UserError
from smoothquant.model import Model
from smoothquant.outputs import versions

UNBOUND = ("export hf", "export w8a8")  # they hold both sets of LongRoPE's frequencies; readers choose by length


class Candidate:
    """The comparison of one engine so far. `add` every sequence in order, `merge` what all ranks have, then take the
    `result`.

    manifest: the manifest of the engine's folder. compared: the number of the rank's sequences so far.
    Raises UserError for an engine of another model.
    """

    def __init__(
        self, label: str, manifest: Manifest, scheme: EngineScheme, thresholds: Thresholds, reference: Reference
    ) -> None:
        check_model(manifest, reference.model, label)
        if scheme.scheme.quantized and scheme.key not in reference.streams:
            raise ValueError("the reference was run without this engine's scheme")
        self.label, self.manifest, self.scheme, self.thresholds = label, manifest, scheme, thresholds
        self.reference, self.compared = reference, 0
        self._stream = reference.streams.get(scheme.key)
        self._ranges, self._channels = activation_ranges(reference.model, reference.act_absmax, scheme)
        self._overflow = overflow(manifest, reference, self._ranges)
        self._comparison = Comparison(reference.tokens)
        before = reference.text.sequences[: reference.sequences.start]
        self._comparison.skip(map(len, before), reference.model.geometry.vocab_size)
        self._squares = torch.zeros(3, dtype=torch.float64)  # |engine - exact|^2, |PyTorch - exact|^2, |exact|^2

    @property
    def exact(self) -> bool:
        """Whether the distance to the exact W8A8 logits is measured."""
        return self._stream is not None and self._stream.exact

    @property
    def streamed(self) -> bool:
        """Whether the reference has run the engine beside its own layers."""
        return self.scheme.folder is not None

    def add(self, engine: Engine | None, reference_logits: Tensor) -> None:
        """Compare one more sequence. engine: None for one that is streamed. reference_logits: the logits of the
        reference, (tokens, vocab).

        Raises UserError for an engine with another vocabulary, ThresholdError for logits that are not finite.
        """
        reference, sequence = self.reference, self.reference.sequences[self.compared]
        ids = reference.text.sequences[sequence]
        logits = engine.logits(ids[None]) if engine else reference.w8a8_logits(self.scheme, sequence)[None]
        check_logits(logits, len(ids), reference.model.geometry.vocab_size, sequence, self._overflow)
        found = logits[0].to(reference_logits.device)
        self._comparison.add(reference_logits, found, ids)
        if self.exact:
            true = reference.w8a8_logits(self.scheme, sequence, torch.float64)
            pytorch = reference.w8a8_logits(self.scheme, sequence)
            parts = (found - true, pytorch - true, true)
            self._squares += torch.stack([part.double().square().sum() for part in parts]).cpu()
        self.compared += 1

    def merge(self) -> None:
        """Put together what all ranks have compared, each its sequences."""
        self._comparison.merge(self.reference.team)
        self._squares = self.reference.team.total({"": self._squares})[""]

    def state(self) -> dict[str, Tensor]:
        """The sums over all sequences so far, by name."""
        compared = torch.tensor([self.compared])
        return {**self._comparison.state(), "compared": compared, "squares": self._squares}

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Continue from the sums that `state` returned."""
        self._comparison.restore(state)
        self.compared, self._squares = int(state["compared"]), state["squares"]

    def result(self) -> Validation:
        """The validation of the engine. Raises UserError for a threshold on a measure that was not taken."""
        metrics = self._comparison.metrics()
        engine, pytorch = (self._squares[:2] / self._squares[2].clamp_min(1e-300)).sqrt().tolist()
        exactness = Exactness(engine, pytorch) if self.exact else None
        names = ("kl_mean", "kl_p99", "top1", "perplexity_ratio", "relative_error")
        measured = {name: getattr(metrics, name) for name in names}
        if exactness:
            measured["exactness_ratio"] = exactness.ratio
        checks, linears = self.thresholds.check(measured), self._stream.linears if self._stream else ()
        return Validation(
            label=self.label,
            subject=self._subject(),
            metrics=metrics,
            checks=checks,
            exactness=exactness,
            linears=linears,
            hidden_errors=self._stream.hidden_errors if self._stream else (),
            ranges=self._ranges,
            channels=self._channels,
            samples=self._comparison.samples(),
            overflow="" if self.manifest.step in SHOWN else self._overflow,
            unexplained=self.scheme.unexplained,
            advice="" if all(check.passed for check in checks) else self._advice(linears),
        )

    def _advice(self, linears: tuple[LinearError, ...]) -> str:
        """What to change in the export. Nothing is known of that of another tool."""
        if self.manifest.step in (FOREIGN, ANYBODY):
            return ""
        return advice(self.manifest, worst_of(linears), self._stream.weight_share if self._stream else None)

    def _subject(self) -> dict:
        manifest, reference, text = self.manifest, self.reference, self.reference.text
        foreign = manifest.step in (FOREIGN, ANYBODY)
        return {
            "engine": manifest.step,
            "bytes": manifest.nbytes,
            "inputs": dict(manifest.inputs) if foreign else manifest.origin.words(),
            "engine_versions": dict(manifest.versions),
            "checkpoint": reference.model.checkpoint.folder.resolve().name,
            "model": reference.fingerprint,
            "stored": reference.name,
            "reference": reference.description,
            "text": text.source,
            "text_fingerprint": text.fingerprint,
            "sequence_start": text.sequence_start,
            "sequences": len(text.sequences),
            "tokens": reference.tokens,
            "versions": versions(),
        }


def check_model(manifest: Manifest, model: Model, name: str) -> None:
    """Raise UserError if an engine was not made from the reference's checkpoint.

    Another tool's checkpoint must have the sizes of the reference. name: the engine's name in errors.
    """
    geometry = model.geometry
    if manifest.step in (FOREIGN, ANYBODY):
        found = manifest.inputs_as(ForeignInputs)
        for what, number, wanted in (
            ("vocab_size", found.vocab_size, geometry.vocab_size),
            ("hidden_size", found.hidden_size, geometry.hidden_size),
            ("num_hidden_layers", found.num_hidden_layers, geometry.layers),
        ):
            if number != wanted:
                raise UserError(
                    f"{name}: this checkpoint has {what} {number}",
                    expected=f"{wanted}, the reference's",
                    do="give the model that it was converted from",
                )
    elif manifest.origin.model != model.checkpoint.fingerprint:
        raise UserError(
            f"{name}: this engine was made from model {manifest.origin.model}",
            expected=f"{model.checkpoint.fingerprint}, the reference",
            do="give the checkpoint that the engine was made from",
        )
    elif manifest.step not in UNBOUND and manifest.origin.max_positions != model.choices.get("max_positions"):
        length = manifest.origin.max_positions
        raise UserError(
            f"{name}: this engine's rotary frequencies are those of sequences up to {length} tokens",
            expected=f"those of the reference, up to {geometry.max_positions}",
            do=f"validate with --max-length {length}",
        )
