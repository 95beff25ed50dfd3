"""Which versions of TensorRT-LLM build an engine from these files.

    0.21.0 ... 1.2.1   release images; the TensorRT backend is "legacy" from 1.0 on
    1.3.0rc0 ... rc20  still have it
    later              removed: trtllm-build, the layers and the C++ runtime; the PyTorch backend runs no W8A8 INT8

Source: release notes of 1.0 to 1.3.0rc20, and the pull requests #15763, #15767, #15907, #15918, #16369 that removed it.
"""

from __future__ import annotations

import re

from smoothquant.errors import UserError

DEFAULT = "1.2.1"  # the newest stable version
FIRST, LAST = "0.21.0", "1.3.0rc20"
_PATTERN = re.compile(r"(\d+)\.(\d+)(?:\.(\d+))?(?:rc(\d+))?(?:\.post\d+)?")
_NO_RC = 1_000_000  # a release comes after its candidates


def check_version(version: str) -> None:
    """Raise UserError unless this version builds engines from what is written here."""
    found = _parse(version)
    expected = f"{FIRST} to {DEFAULT}, or a candidate of 1.3.0 up to rc20"
    if found is None:
        raise UserError(f"TensorRT-LLM version {version!r}", expected=expected)
    if found > (_parse(LAST) or ()):
        raise UserError(
            f"TensorRT-LLM {version} builds no TensorRT engines (removed after {LAST}), and its PyTorch backend does "
            "not run W8A8 INT8",
            expected=expected,
            do="stay with 1.2.1, or serve smoothquant export w8a8 with vLLM",
        )
    if found < (_parse(FIRST) or ()):
        raise UserError(
            f"TensorRT-LLM {version} is older than this form of the checkpoint was checked against",
            expected=expected,
            do="take a newer release image",
        )


def _parse(version: str) -> tuple[int, ...] | None:
    """1.3.0rc20.post1 -> (1, 3, 0, 20): comparable."""
    match = _PATTERN.fullmatch(version)
    if match is None:
        return None
    major, minor, patch, candidate = match.groups()
    return int(major), int(minor), int(patch or 0), _NO_RC if candidate is None else int(candidate)
