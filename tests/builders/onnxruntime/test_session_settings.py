"""Session settings follow the processor."""

from __future__ import annotations

import pytest

from builders.onnxruntime.session import settings


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
