"""The hidden states of all tokens between two layers, in memory, or in mapped files if they are large.

    hidden.FORM.0, hidden.FORM.1    (tokens, hidden) each: layer n reads file n % 2 and writes the other

Each form of the layers (the stored form, a quantized form) has hidden states of its own. In memory a layer's output
takes the place of its input. In files it does not: the input of a layer stays whole until the layer is done, so that an
interrupted run can run the layer again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from smoothquant.data_file import DataFile
from smoothquant.device import free_bytes
from smoothquant.machine import release_mapped
from smoothquant.workroom import Workroom

IN_MEMORY = 4 << 30  # bytes of hidden states that are held in memory
SHARE = 1 / 8  # of a GPU's free memory that they may take; layers, scores and a search's own sweeps need the rest
PREFIX = "hidden."

Forms = Mapping[str, torch.dtype]  # name of a form of the layers -> dtype of its hidden states


class Hidden:
    """The hidden states of every form before and after a layer, (tokens, hidden) each.

    tokens: by form. work: the workspace that holds the mapped files; without one everything is in memory. in_memory:
        the bytes that are not mapped; None for `IN_MEMORY`. device: what computes: the states lie there if it has room
        to spare, and else in the machine's memory. mappable: whether there may be mapped files; ranks that share the
        tokens have no place for theirs, and hold them in the memory of all machines.
    mapped: whether the states lie in files, which outlive an interruption.
    """

    def __init__(
        self,
        tokens: Mapping[str, int],
        width: int,
        forms: Forms,
        work: Workroom | None = None,
        in_memory: int | None = None,
        device: str = "cpu",
        *,
        mappable: bool = True,
    ) -> None:
        self.forms, self.tokens = dict(forms), dict(tokens)
        self._shapes = {form: (tokens[form], width) for form in forms}
        limit = IN_MEMORY if in_memory is None else in_memory
        self.mapped = mappable and work is not None and self._lie_in_files(work, limit)
        if work is not None:
            work.require((1 + self.mapped) * self.nbytes)
        spare = device != "cpu" and not self.mapped and self.nbytes <= free_bytes(device) * SHARE
        self._place = device if spare else "cpu"
        self._sides: dict[str, tuple[Tensor, Tensor]] = {}
        self._files: dict[str, tuple[DataFile, DataFile]] = {}
        for form, dtype in self.forms.items():
            if work is not None and self.mapped:
                first, second = (work.scratch(f"{PREFIX}{form}.{side}") for side in (0, 1))
                self._files[form] = (first, second)
                self._sides[form] = (self._map(first, form), self._map(second, form))
            else:
                room = torch.empty(self._shapes[form], dtype=dtype, device=self._place)
                self._sides[form] = (room, room)

    @property
    def nbytes(self) -> int:
        """The size of the states of all forms, in bytes."""
        return sum(math.prod(self._shapes[form]) * dtype.itemsize for form, dtype in self.forms.items())

    def before(self, layer: int, form: str) -> Tensor:
        """The input of a layer, (tokens, hidden); before(layers, form) is the output of the last layer."""
        return self._sides[form][layer % 2]

    def release(self) -> None:
        """Take mapped states out of the memory of this process. They come back when they are used."""
        for sides in self._sides.values() if self.mapped else ():
            for side in sides:
                release_mapped(side.data_ptr(), side.nbytes)

    def state(self, layer: int) -> dict[str, Tensor]:
        """What has to be kept, beside mapped files, to go on before `layer`. What the files hold then is noted."""
        for sides in self._files.values():
            sides[layer % 2].changed()
            sides[1 - layer % 2].unwritten()
        return {} if self.mapped else {PREFIX + form: self.before(layer, form).cpu() for form in self.forms}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take the hidden states out of an earlier `state`. Raises KeyError for a missing tensor or another shape."""
        for form, dtype in ({} if self.mapped else self.forms).items():
            found = state.pop(PREFIX + form)
            if found.shape != self._shapes[form] or found.dtype != dtype:
                raise KeyError(PREFIX + form)
            room = found.to(self._place)
            self._sides[form] = (room, room)

    def _lie_in_files(self, work: Workroom, in_memory: int) -> bool:
        """Whether the states are mapped: where an interrupted run had them, whatever its budget was."""
        if work.next_layer:
            return not any(name.startswith(PREFIX) for name in work.state())
        return self.nbytes > in_memory

    def _map(self, file: DataFile, form: str) -> Tensor:
        """A file as a tensor. A full disk is an error now, and not when a page is used."""
        dtype, count = self.forms[form], math.prod(self._shapes[form])
        file.reserve(count * dtype.itemsize, fill=True)
        return torch.from_file(str(file.path), shared=True, size=count, dtype=dtype).view(self._shapes[form])
