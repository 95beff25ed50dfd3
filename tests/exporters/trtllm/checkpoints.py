"""Exports of tiny models for the tests of this folder, and how to read them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from act_scales.collect import collect
from act_scales.text import Text
from exporters.export import Source, export
from exporters.trtllm import MODES, Mode, Ranks, TrtllmWriter
from recipes.families import open_model
from smoothquant.scheme import SHARED_CACHES
from smoothquant.settings import SmoothingSettings
from tests import zoo
from tests.models import sample_ids

PER_TOKEN, STATIC = MODES[0], MODES[2]
NO_PLUGINS = MODES[4]


def make(name: str, root: Path, dtype: torch.dtype = torch.float16, **config_changes: object) -> Source:
    """A layout of the zoo, calibrated. dtype: float16, so that an engine's rounds nothing that is not smoothed."""
    model = open_model(zoo.save(name, root / "model", dtype=dtype, **config_changes))
    text = Text(tuple(sample_ids()), "sample")
    scales = collect(model, text, root / "act_scales.safetensors", dtype="float32")
    return Source(model, SmoothingSettings(0.5), scales.input_absmax, {"model": "m"}, scales.output_absmax)


def makers(root: pytest.TempPathFactory, layouts: Mapping[str, Mapping[str, object]]) -> Callable[[str], Source]:
    """`make` by a layout's name, each once. layouts: name -> changes to its config."""
    return cache(lambda name: make(name, root.mktemp(name), **layouts[name]))


def settings(mode: Mode, groups: str = "default", kv: str = "float", dtype: str = "float16") -> SmoothingSettings:
    """What a mode can hold, nearest to `groups`."""
    if not mode.plugin:
        groups = "unfolded"
    cache = "shared" if kv == "int8" else "none"
    return SmoothingSettings(0.5, groups, dtype if groups in ("run-time", "unfolded") else "float32", cache)


def with_cache(mode: Mode, kv: str) -> Mode:
    """A mode with another KV cache."""
    return replace(mode, scheme=replace(mode.scheme, kv_cache=SHARED_CACHES[kv]))


def write(
    source: Source,
    out: Path,
    mode: Mode = PER_TOKEN,
    tp: int = 1,
    pp: int = 1,
    kv: str = "float",
    groups: str = "default",
) -> Path:
    """Export to a folder."""
    source = replace(source, settings=settings(mode, groups, kv))
    export(source, [TrtllmWriter(out, with_cache(mode, kv), Ranks(tp, pp))])
    return out


def ranks(folder: Path) -> list[dict[str, Tensor]]:
    """The tensors of every rank."""
    files = sorted(folder.glob("rank*.safetensors"), key=lambda path: int(path.stem.removeprefix("rank")))
    return [load_file(file) for file in files]
