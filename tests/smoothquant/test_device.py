"""Which arithmetic "auto" means, on which machine."""

from __future__ import annotations

import pytest
import torch

from smoothquant import device as module
from smoothquant.device import choose_device, choose_dtype

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.parametrize(
    ("stored", "device", "flags", "expected"),
    [
        (BF16, "cpu", {"amx_bf16"}, BF16),
        (BF16, "cpu", {"avx512_bf16"}, BF16),
        (BF16, "cpu", {"avx2", "avx512f"}, F32),  # emulated bfloat16 is slower than float32
        (F16, "cpu", {"amx_bf16"}, BF16),  # range before digits: activations must not overflow
        (F16, "cpu", set(), F32),
        (F32, "cpu", {"amx_bf16"}, F32),
        (BF16, "cuda", set(), BF16),
        (F16, "cuda:1", set(), F16),
        (F32, "cuda", set(), F32),
    ],
)
def test_auto(
    stored: torch.dtype, device: str, flags: set[str], expected: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "cpu_flags", lambda: flags)
    assert choose_dtype("auto", stored, device) == expected
    assert choose_dtype("float32", stored, device) == F32


def test_a_gpu_is_used_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto") == "cuda"
    assert choose_device("cpu") == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == "cpu"
