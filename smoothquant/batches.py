"""The batches of a sweep: sequences of one length that go through a layer together, and which of them a rank has."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby

from torch import Tensor

from smoothquant.memory import UNLIMITED, Budget
from smoothquant.team import Team

BATCH_TOKENS = 1024  # tokens in one matrix product: enough for efficiency, and small beside a layer


@dataclass(frozen=True)
class Batch:
    """Sequences of one length that run together. rows: the places of their tokens among all tokens. length: the tokens
    of each."""

    rows: slice
    length: int

    def behind(self, tokens: int) -> Batch:
        """The same, with places among the tokens behind the first ones."""
        return Batch(slice(self.rows.start - tokens, self.rows.stop - tokens), self.length)


def sequences_together(length: int, budget: Budget = UNLIMITED) -> int:
    """How many sequences of so many tokens go through a layer together."""
    return max(1, min(BATCH_TOKENS, budget.tokens or BATCH_TOKENS) // max(1, length))


def batches_of(sequences: Sequence[Tensor], budget: Budget = UNLIMITED) -> Iterator[Batch]:
    """Yield batches of consecutive sequences of one length."""
    start = 0
    for length, group in groupby(sequences, key=len):
        end = start + length * len(list(group))
        step = max(1, length * sequences_together(length, budget))
        for begin in range(start, end, step):
            yield Batch(slice(begin, min(begin + step, end)), length)
        start = end


def shared_batches(sequences: Sequence[Tensor], team: Team, budget: Budget = UNLIMITED) -> list[Batch]:
    """The batches that this rank runs."""
    batches = list(batches_of(sequences, budget))
    return batches[team.share(len(batches))]


def sequences_in(batches: Sequence[Batch], sequences: Sequence[Tensor]) -> range:
    """The places of the sequences that are in a run of batches."""
    starts = [0, *accumulate(map(len, sequences))]
    return range(starts.index(batches[0].rows.start), starts.index(batches[-1].rows.stop)) if batches else range(0)
