"""Several processes that share one step, each with some of its sequences or layers (`smoothquant.torchrun`).

Rank 0 leads: it owns the working folder, shows what is going on, and names the output. A process alone is rank 0 of
one: the same code, without messages. Sequences go to ranks in whole runs, so that what ranks have found, put together
in their order, has the order of one process. Sums are of float64, and added in that order whatever message comes first.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from smoothquant.errors import LostRankError, UserError

if TYPE_CHECKING:  # a build does without torch
    from torch import Tensor

Value = TypeVar("Value")


@dataclass(frozen=True)
class Team:
    """The processes of a step, and which of them this one is. place: among those of this machine. linked: whether they
    send messages; a process alone does not.

    All ranks call a method that needs the others, in the same order. Raises LostRankError where another one has ended.
    """

    rank: int = 0
    count: int = 1
    place: int = 0
    linked: bool = False

    @property
    def leads(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def share(self, whole: int, rank: int | None = None) -> slice:
        """The places, among so many things in a row, of those that this rank has, or another one."""
        rank = self.rank if rank is None else rank
        return slice(whole * rank // self.count, whole * (rank + 1) // self.count)

    def turns(self, things: Sequence[Value]) -> Sequence[Value]:
        """Every so many of things that need not stay in a row, from the rank's own on. `woven` puts results back."""
        return things[self.rank :: self.count]

    def woven(self, mine: Sequence[Value]) -> list[Value]:
        """What all ranks have made of their `turns`, in the order of the things."""
        found = self.gathered(mine)
        return [part[at] for at in range(len(found[0])) for part in found if at < len(part)]

    def device(self, name: str) -> str:
        """The device of this rank, by what a user has named for all of them. Raises UserError."""
        if not self.linked or name == "cpu":
            return name
        import torch

        mine = f"cuda:{self.place}"
        if name == "auto":
            return mine if torch.cuda.device_count() > self.place else "cpu"
        if name != "cuda":
            raise UserError(f"--device {name} for {self.count} processes", expected="cuda: each takes a GPU of its own")
        return mine

    def check_enough(self, samples: int, source: str) -> None:
        """Raise UserError for a text with fewer samples than there are ranks."""
        if samples < self.count:
            raise UserError(
                f"{source}: {samples} samples for {self.count} processes",
                expected="at least one for each",
                do="give more text, a smaller --length, or a smaller --nproc-per-node",
            )

    def agree(self, told: Mapping[str, Any]) -> None:
        """Raise UserError unless all ranks were told the same. told: what their results depend on."""
        first, *others = self.gathered(dict(told))
        for rank, theirs in enumerate(others, start=1):
            for name in sorted(first.keys() | theirs.keys()):
                if first.get(name) != theirs.get(name):
                    raise UserError(
                        f"rank {rank} has other {name} than rank 0 ({_short(theirs.get(name))}, not "
                        f"{_short(first.get(name))})",
                        expected="one model, one text, the same options and versions for all processes",
                        do="give all machines the same command and the same files",
                    )

    def wait(self) -> None:
        """Wait until all ranks have come here."""
        self.gathered(None)

    def same(self, value: Value) -> Value:
        """The value of rank 0."""
        found = [value]
        if self.linked:
            self._do("broadcast_object_list", found, src=0)
        return found[0]

    def gathered(self, value: Value) -> list[Value]:
        """The values of all ranks, in their order. They hold no tensor on a GPU."""
        found = [value] * self.count
        if self.linked:
            self._do("all_gather_object", found, value)
        return found

    def largest(self, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """By name, the larger of each element over the ranks that have the name."""
        import torch

        return self._folded(found, torch.maximum)

    def total(self, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """By name, the sums over the ranks that have the name, in their order. found: small, float64."""
        return self._folded(found, operator.add)

    def total_of(self, sums: Tensor) -> Tensor:
        """The sums over all ranks, in their order, of a large tensor: every rank adds a part of it. sums: float64, of
        one shape; on the CPU or on the rank's own GPU."""
        if not self.linked:
            return sums
        import torch

        flat = sums.flatten()
        parts = torch.nn.functional.pad(flat, (0, -len(flat) % self.count)).view(self.count, -1)
        received = torch.empty_like(parts)
        self._do("all_to_all_single", received, parts)
        mine = received[0]
        for theirs in received[1:]:
            mine = mine + theirs
        whole = [torch.empty_like(mine) for _ in range(self.count)]
        self._do("all_gather", whole, mine)
        return torch.cat(whole)[: len(flat)].view_as(sums)

    def rows_at_lead(self, rows: Tensor) -> Tensor:
        """For rank 0 the rows of all ranks, in their order; for the others their own. rows: on the CPU."""
        import torch

        counts = self.gathered(len(rows))
        if not self.leads:
            self._do("send", _bytes(rows), dst=0)
            return rows
        found = [rows]
        for rank, count in enumerate(counts[1:], start=1):
            found.append(rows.new_empty(count, *rows.shape[1:]))
            self._do("recv", _bytes(found[-1]), src=rank)
        return torch.cat(found) if self.count > 1 else rows

    def rows_from_lead(self, rows: Tensor | None, mine: Tensor) -> Tensor:
        """This rank's part of the rows that rank 0 has.

        rows: those of all ranks, where this is rank 0. mine: as many as this rank has, of any content.
        """
        counts = self.gathered(len(mine))
        if not self.leads:
            mine = mine.clone()
            self._do("recv", _bytes(mine), src=0)
            return mine
        assert rows is not None
        if not self.linked:
            return rows
        parts = rows.split(counts)
        for rank, part in enumerate(parts[1:], start=1):
            self._do("send", _bytes(part.contiguous()), dst=rank)
        return parts[0].clone()

    def rows_of_all(self, rows: Tensor) -> Tensor:
        """The rows of all ranks, in their order. rows: on the CPU."""
        if not self.linked:
            return rows
        import torch

        found = []
        for rank, count in enumerate(self.gathered(len(rows))):
            found.append(rows.contiguous() if rank == self.rank else rows.new_empty(count, *rows.shape[1:]))
            if count:
                self._do("broadcast", _bytes(found[-1]), src=rank)
        return torch.cat(found)

    def _folded(self, found: Mapping[str, Tensor], operation: Callable[[Tensor, Tensor], Tensor]) -> dict[str, Tensor]:
        if not self.linked:
            return dict(found)
        together: dict[str, Tensor] = {}
        for theirs in self.gathered({name: values.cpu() for name, values in found.items()}):
            for name, values in theirs.items():
                together[name] = operation(together[name], values) if name in together else values
        return together

    def _do(self, operation: str, *arguments: Any, **options: Any) -> None:
        """Call a function of torch.distributed."""
        from torch import distributed

        try:
            getattr(distributed, operation)(*arguments, **options)
        except RuntimeError as error:  # what gloo and NCCL make of a connection that is closed
            raise LostRankError(
                f"rank {self.rank} has lost the other processes of this run",
                expected="that all of them work to the end",
                do="see what ended one of them (dmesg, its machine); the same command goes on from here",
            ) from error


ALONE = Team()


def _bytes(values: Tensor) -> Tensor:
    """The memory of a tensor, uint8: messages of every dtype."""
    import torch

    return values.view(-1).view(torch.uint8)


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
