"""Check the tensors of a plan's files before they are used: names, shapes, dtypes and numbers (`smoothquant.plan`)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from smoothquant.artifacts.ports import CACHED, KEY
from smoothquant.artifacts.smoothing_file import ABSMAX, CACHE_SCALE, SCALE
from smoothquant.errors import UserError
from smoothquant.head import is_smoothable
from smoothquant.int8_checkpoint import BIAS, WEIGHT, WEIGHT_SCALE
from smoothquant.model import Model
from smoothquant.quantization import QMAX
from smoothquant.roles import ROUTER
from smoothquant.settings import SmoothingSettings

DO = "search this model again: smoothquant search MODEL --text FILE --out PLAN"

Numbers = tuple[str, Callable[[Tensor], bool]]  # what the numbers of a tensor are, in words; whether they are
FINITE: Numbers = ("finite numbers", lambda tensor: bool(tensor.isfinite().all()))
POSITIVE: Numbers = ("finite numbers above 0", lambda tensor: FINITE[1](tensor) and bool((tensor > 0).all()))
RANGE: Numbers = ("finite numbers from 0 on", lambda tensor: FINITE[1](tensor) and bool((tensor >= 0).all()))
INT8: Numbers = (f"numbers within +-{QMAX}", lambda tensor: int(tensor.amin()) >= -QMAX)


@dataclass(frozen=True)
class PlanTensor:
    """What a tensor of the file is. beside: the name of the tensor without which it does not occur; empty for one that
    stands alone."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    numbers: Numbers
    beside: str = ""


def check_tensors(
    model: Model, index: int, settings: SmoothingSettings, tensors: Mapping[str, Tensor], where: str
) -> None:
    """Raise UserError unless the tensors of a layer's file are this model's, with these settings of smoothing. where:
    the file."""
    rules = dict(_rules(model, index, settings))
    _check_all(tensors, rules, f"layer {index}", where)
    for name, _ in model.linears():
        if name + ABSMAX in rules and name + ABSMAX not in tensors:
            raise UserError(f"{where}: tensor {name}{ABSMAX} is missing", expected="one for every linear", do=DO)
    _check_together(model, index, settings, tensors, where)


def check_head(model: Model, tensors: Mapping[str, Tensor], where: str) -> None:
    """Raise UserError unless the tensors of a head's file are this model's. where: the file."""
    name, geometry = model.family.lm_head, model.geometry
    shape = (geometry.vocab_size, geometry.embedded_size)
    rules = {
        name + WEIGHT: PlanTensor(torch.int8, shape, INT8, beside=name + WEIGHT_SCALE),
        name + WEIGHT_SCALE: PlanTensor(torch.float32, shape[:1], POSITIVE, beside=name + WEIGHT),
    }
    if is_smoothable(model):
        rules[name + SCALE] = PlanTensor(torch.float32, shape[1:], POSITIVE)
    _check_all(tensors, rules, "the output head", where)


def _check_all(tensors: Mapping[str, Tensor], rules: Mapping[str, PlanTensor], part: str, where: str) -> None:
    """Raise UserError unless every tensor is as its rule says. part: of the model, in words."""
    for name, tensor in tensors.items():
        if name not in rules:
            raise UserError(f"{where}: tensor {name}", expected=f"tensors of {part} of this model", do=DO)
        _check(name, tensor, rules[name], tensors, where)


def _check(name: str, tensor: Tensor, rule: PlanTensor, tensors: Mapping[str, Tensor], where: str) -> None:
    if (tensor.dtype, tuple(tensor.shape)) != (rule.dtype, rule.shape):
        raise UserError(
            f"{where}: tensor {name} is {_words(tensor.dtype)} {list(tensor.shape)}",
            expected=f"{_words(rule.dtype)} {list(rule.shape)}",
            do=DO,
        )
    says, holds = rule.numbers
    if not holds(tensor):
        raise UserError(f"{where}: tensor {name} holds others than {says}", expected=says, do=DO)
    if rule.beside and rule.beside not in tensors:
        raise UserError(f"{where}: tensor {name} without {rule.beside}", expected="both or none", do=DO)


def _check_together(
    model: Model, index: int, settings: SmoothingSettings, tensors: Mapping[str, Tensor], where: str
) -> None:
    """Raise UserError unless linears of one smoothing group have one scale, and linears of one matrix one range."""
    groups = [group.linears for group in settings.chosen(model.groups, model.quantized_roles)]
    for end, together in ((SCALE, groups), (ABSMAX, model.side_by_side)):
        for roles in together:
            names = [model.linear(index, role) + end for role in roles]
            first, *others = (tensors.get(name) for name in names)
            for name, other in zip(names[1:], others, strict=True):
                if other is not first and (other is None or first is None or not other.equal(first)):
                    raise UserError(
                        f"{where}: {names[0]} and {name} differ",
                        expected="the same for linears that read one input",
                        do=DO,
                    )
    smoothed = {model.linear(index, role) + SCALE for roles in groups for role in roles}
    smoothed.add(model.family.module(index, KEY) + SCALE)
    for name in tensors:
        if name.endswith(SCALE) and name not in smoothed:
            raise UserError(
                f"{where}: tensor {name}",
                expected=f"scales of linears that groups {settings.groups!r} smooth in family {model.family.name}",
                do=DO,
            )


def _rules(model: Model, index: int, settings: SmoothingSettings) -> Iterator[tuple[str, PlanTensor]]:
    """Every tensor that a layer's file may hold, by name."""
    family, geometry = model.family, model.geometry
    if settings.smooths_keys:
        yield family.module(index, KEY) + SCALE, PlanTensor(torch.float32, (geometry.kv_size,), POSITIVE)
    key, value = (family.module(index, part) + CACHE_SCALE for part in CACHED)
    yield key, PlanTensor(torch.float32, (), POSITIVE, beside=value)
    yield value, PlanTensor(torch.float32, (), POSITIVE, beside=key)
    for name, roles in model.stored.items():
        full, shapes = family.module(index, name), [family.shape(role, geometry) for role in roles]
        rows, columns = sum(out for out, _ in shapes), shapes[0][1]
        yield full + SCALE, PlanTensor(torch.float32, (columns,), POSITIVE)
        yield full + ABSMAX, PlanTensor(torch.float32, (columns,), RANGE)
        if roles == (ROUTER,):
            continue
        yield full + WEIGHT, PlanTensor(torch.int8, (rows, columns), INT8, beside=full + WEIGHT_SCALE)
        yield full + WEIGHT_SCALE, PlanTensor(torch.float32, (rows,), POSITIVE, beside=full + WEIGHT)
        if any(family.has_bias(role, geometry) for role in roles):
            yield full + BIAS, PlanTensor(torch.float32, (rows,), FINITE, beside=full + WEIGHT)


def _words(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
