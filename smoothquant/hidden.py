"""The hidden states of all tokens between two layers: in memory, or in mapped files where they are many.

    hidden.FORM.0, hidden.FORM.1    (tokens, hidden) each: layer n reads file n % 2 and writes the other

Each form of the layers (the checkpoint's own, a quantized one) has hidden states of its own. In memory a layer's
output takes the place of its input. In files it does not: what a layer starts from stays whole until the layer is
done, so that an interrupted run can do it again.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

import torch
from torch import Tensor

from smoothquant.errors import OutputError
from smoothquant.workspace import Workspace

IN_MEMORY = 4 << 30  # bytes of hidden states that are held in memory
PREFIX = "hidden."

Forms = Mapping[str, torch.dtype]  # name of a form of the layers -> dtype of its hidden states


class Hidden:
    """Hidden states (tokens, hidden) of every form, before and after a layer.

    work: holds the mapped files; without one everything is in memory.
    mapped: whether the states lie in files, where they outlive an interruption by themselves.
    """

    def __init__(self, tokens: int, width: int, forms: Forms, work: Workspace | None = None) -> None:
        self.forms, self._shape = dict(forms), (tokens, width)
        self.mapped = work is not None and self.nbytes > IN_MEMORY
        if work is not None:
            work.require((1 + self.mapped) * self.nbytes)
        self._sides: dict[str, tuple[Tensor, Tensor]] = {}
        for form, dtype in self.forms.items():
            if work is not None and self.mapped:
                first, second = (self._map(work, f"{PREFIX}{form}.{side}", dtype) for side in (0, 1))
                self._sides[form] = (first, second)
            else:
                room = torch.empty(self._shape, dtype=dtype)
                self._sides[form] = (room, room)

    @property
    def nbytes(self) -> int:
        """Size of the states of all forms."""
        return self._shape[0] * self._shape[1] * sum(dtype.itemsize for dtype in self.forms.values())

    def before(self, layer: int, form: str) -> Tensor:
        """What a layer reads, (tokens, hidden); before(layers, form) is what the last layer gave."""
        return self._sides[form][layer % 2]

    def state(self, layer: int) -> dict[str, Tensor]:
        """What has to be kept, beside mapped files, to go on before `layer`."""
        return {} if self.mapped else {PREFIX + form: self.before(layer, form) for form in self.forms}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Take what `state` gave out of `state`. KeyError for what it lacks, or has in another shape."""
        for form, dtype in ({} if self.mapped else self.forms).items():
            found = state.pop(PREFIX + form)
            if found.shape != self._shape or found.dtype != dtype:
                raise KeyError(PREFIX + form)
            self._sides[form] = (found, found)

    def _map(self, work: Workspace, name: str, dtype: torch.dtype) -> Tensor:
        """A file of the workspace as a tensor. It is made anew where no layer is done yet."""
        path, count = work.path(name), self._shape[0] * self._shape[1]
        nbytes = count * dtype.itemsize
        if work.next_layer == 0:
            with open(path, "wb") as file:
                os.posix_fallocate(file.fileno(), 0, nbytes)  # a full disk is an error now, and not when a page is used
        found = path.stat().st_size if path.exists() else 0
        if found != nbytes:
            raise OutputError(
                f"{path}: {found} bytes",
                expected=f"{nbytes}, the hidden states of an interrupted run",
                do=f"remove {path.parent} and start again",
            )
        return torch.from_file(str(path), shared=True, size=count, dtype=dtype).view(self._shape)
