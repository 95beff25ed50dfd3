"""Settings follow the processor, and reach the thread that calls."""

from __future__ import annotations

import pytest
import torch

from builders.onnxruntime.session import settings, subnormals_as_zero


@pytest.mark.parametrize(
    ("flags", "exact"),
    [
        ({"avx2"}, True),
        ({"avx2", "avx512f"}, True),
        ({"avx2", "avx_vnni"}, False),
        ({"avx2", "avx512f", "avx512_vnni", "amx_int8"}, False),
        ({"asimddp"}, False),
        (set(), False),
    ],
)
def test_u8_by_u8_only_where_the_other_saturates(flags: set[str], exact: bool) -> None:
    """With VNNI the exact kernel is needless, and four times slower."""
    assert (settings(flags).get("session.x64quantprecision") == "1") == exact


def test_subnormals_are_back_afterwards() -> None:
    least = torch.full((64,), torch.finfo(torch.float32).tiny / 2)
    with pytest.raises(KeyError), subnormals_as_zero():
        assert (least * 1.0 == 0).all()
        raise KeyError
    assert (least * 1.0 > 0).all()
