"""A device that is not there: PyTorch's "meta", whose tensors hold numbers here, computed by the CPU.

    with StandIn() as device:
        run(device=NAME)
    device.most      # the most bytes that lay on it at one time

As on a GPU, a tensor comes there and back by `to`, `cpu` and copies alone, and an operation that finds tensors in both
places fails. (Numbers without dimensions may lie on the CPU, and so may an index.) Threads other than the one that
entered see the plain "meta".
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

NAME = "meta"
MOVES = {torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default}
INDEXING = {torch.ops.aten.index.Tensor, torch.ops.aten.index_put_.default, torch.ops.aten._index_put_impl_.default}


class There(Tensor):
    """A tensor on the device. held: its numbers."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> There:
        found = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, held.stride(), held.storage_offset(), dtype=held.dtype, device=torch.device(NAME)
        )
        found.held = held
        return found

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{func} outside the block of the stand-in")

    def tolist(self) -> Any:
        return self.held.tolist()


class StandIn(TorchDispatchMode):
    """The device. most: the most bytes that lay on it at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.most = self.now = 0
        self._users: dict[int, int] = {}  # tensors of each storage

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = dict(kwargs or {})
        wanted = options.get("device")
        given = [one for one in tree_leaves((args, options)) if isinstance(one, Tensor)]
        there = [one for one in given if isinstance(one, There)]
        assert all(isinstance(one, There) for one in given if one.is_meta), f"{func}: nobody knows these numbers"
        if there and func not in MOVES:
            allowed = given[1:] if func in INDEXING else []
            here = [one for one in given if not isinstance(one, There) and one.dim()]
            assert all(any(one is other for other in allowed) for one in here), f"{func} of tensors in two places"
        if wanted is not None:
            options["device"] = "cpu"
            on_device = torch.device(wanted).type == NAME
        else:
            on_device = isinstance(given[0], There) if func in MOVES else bool(there)
        made = func(*tree_map(_numbers, args), **tree_map(_numbers, options))
        if not on_device:
            return made
        known = {id(one.held): one for one in there}  # what is changed in place stays what it is
        return tree_map(lambda one: self._there(one, known) if isinstance(one, Tensor) else one, made)

    def _there(self, held: Tensor, known: Mapping[int, There]) -> There:
        if id(held) in known:
            return known[id(held)]
        found, storage = There(held), held.untyped_storage()
        key, nbytes = storage.data_ptr(), storage.nbytes()
        if nbytes:
            self._users[key] = self._users.get(key, 0) + 1
            if self._users[key] == 1:
                self.now += nbytes
                self.most = max(self.most, self.now)
            weakref.finalize(found, self._gone, key, nbytes)
        return found

    def _gone(self, key: int, nbytes: int) -> None:
        self._users[key] -= 1
        if not self._users[key]:
            del self._users[key]
            self.now -= nbytes


def _numbers(one: Any) -> Any:
    return one.held if isinstance(one, There) else one
