"""The ranges that the system is asked to read are those of the layer that comes next."""

from __future__ import annotations

import os
from pathlib import Path
from unittest import mock

import pytest
from safetensors.torch import load_file

from recipes.families import open_model
from smoothquant.artifacts.safetensors_files import as_bytes
from smoothquant.readahead import expect_layer
from tests import zoo


@pytest.mark.parametrize("layout", ["llama", "mixtral", "falcon-7b"])
def test_the_bytes_of_a_layer(layout: str, tmp_path: Path) -> None:
    folder = zoo.save(layout, tmp_path / "model")
    model, file = open_model(folder), folder / "model.safetensors"
    content, asked = file.read_bytes(), []

    def advise(descriptor: int, begin: int, length: int, advice: int) -> None:
        assert advice == os.POSIX_FADV_WILLNEED
        assert Path(os.readlink(f"/proc/self/fd/{descriptor}")) == file.resolve()
        asked.append(content[begin : begin + length])

    with mock.patch.object(os, "posix_fadvise", advise):
        expect_layer(model, 1)
        wanted = [
            bytes(as_bytes(one)) for name, one in load_file(file).items() if f"{model.family.layer.format(1)}." in name
        ]
        assert wanted
        assert sorted(set(asked)) == sorted(set(wanted))
        asked.clear()
        expect_layer(model, model.geometry.layers)
        assert not asked
