"""What lies outside the layers, streamed some rows at a time into the ranks that hold it.

first stage    transformer.vocab_embedding.weight       (vocabulary, hidden), whole on every rank
               transformer.position_embedding.weight    (positions, hidden), learned positions; without the rows
                                                        before position 0
               transformer.ln_embed.{weight,bias}       a norm behind the embedding
last stage     transformer.ln_f.{weight,bias}
               lm_head.weight                           (vocabulary padded with zero rows, hidden), rows divided;
                                                        the embedding once more where they are tied
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from exporters.trtllm.sharding import padded
from smoothquant.artifacts.safetensors_files import Planned, SafetensorsFile
from smoothquant.model import Model

Cast = Callable[[str, Tensor], Tensor]  # (name, tensor) -> in the dtype of the engine


@dataclass(frozen=True)
class Outer:
    """One such tensor. source: its name in the checkpoint. skipped: the number of first rows that are left out.
    divided: whether its rows are divided among the ranks."""

    name: str
    source: str
    first: bool
    skipped: int = 0
    divided: bool = False

    def plan(self, model: Model, dtype: torch.dtype, tp: int) -> Planned:
        """On each rank of its stage."""
        rows, *channels = model.info(self.source).shape
        rows = padded(rows, tp) // tp if self.divided else rows - self.skipped
        return Planned((rows, *channels), dtype)

    def write(self, model: Model, files: list[SafetensorsFile], cast: Cast) -> None:
        """Read it once, and write it to the files of its stage's ranks."""
        row = -self.skipped
        for part in model.rows(self.source):
            kept = cast(self.name, part[max(0, -row) :])
            self._write_rows(files, kept, max(0, row))
            row += len(part)
        each = files[0].plan[self.name].shape[0]
        missing = each * len(files) - row if self.divided else 0
        self._write_rows(files, torch.zeros(missing, *kept.shape[1:], dtype=kept.dtype), row)

    def _write_rows(self, files: list[SafetensorsFile], part: Tensor, row: int) -> None:
        """part: rows of the whole tensor from `row` on."""
        each = files[0].plan[self.name].shape[0]
        for rank, file in enumerate(files):
            start = rank * each if self.divided else 0
            mine = part[max(0, start - row) : max(0, start + each - row)]
            if len(mine):
                file.write_part(self.name, mine, max(0, row - start))


def outer_tensors(model: Model) -> Iterator[Outer]:
    """All of a model."""
    family = model.family
    yield Outer("transformer.vocab_embedding.weight", f"{family.embedding}.weight", first=True)
    if family.positions:
        positions = f"{family.positions}.weight"
        yield Outer("transformer.position_embedding.weight", positions, first=True, skipped=family.position_offset)
    for name, module, first in (("ln_embed", family.embedding_norm, True), ("ln_f", family.final_norm, False)):
        if module:
            yield Outer(f"transformer.{name}.weight", f"{module}.weight", first)
            if family.norm == "layer":
                yield Outer(f"transformer.{name}.bias", f"{module}.bias", first)
    yield Outer("lm_head.weight", model.lm_head, first=False, divided=True)
