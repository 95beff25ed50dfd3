"""Every dtype of the format is written as the safetensors package reads it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from smoothquant.artifacts.safetensors_files import CODES, Planned, SafetensorsFile


@pytest.mark.parametrize("dtype", CODES, ids=str)
def test_the_package_reads_what_was_written(dtype: torch.dtype, tmp_path: Path) -> None:
    bits = torch.arange(48, dtype=torch.uint8).remainder(2 if dtype == torch.bool else 48)
    tensor = bits.view(dtype).reshape(3, -1)
    file = SafetensorsFile(tmp_path / "out.safetensors", {"x": Planned(tuple(tensor.shape), dtype)})
    file.write_part("x", tensor[2:], 2)
    file.write_part("x", tensor[:2], 0)
    found = load_file(tmp_path / "out.safetensors")["x"]
    assert found.dtype == dtype
    assert found.shape == tensor.shape
    assert found.view(torch.uint8).equal(tensor.view(torch.uint8))
