"""Which versions of TensorRT-LLM build an engine from these files: one table, for who exports, builds and serves.

    0.20.0             the first with a release image of NVIDIA's
    1.0.0              from here on the TensorRT backend is "legacy", and PyTorch the default of NVIDIA's tools
    1.2.1              the newest stable one
    1.3.0rc0 ... rc20  candidates that still have it
    later              removed: trtllm-build, the layers and the C++ runtime; the PyTorch backend runs no W8A8 INT8

The files are the same for all of them. Source: release notes of 0.20 to 1.3.0rc20, NVIDIA's list of Triton containers
(1.0.3.2510), and the pull requests #15763, #15767, #15907, #15918, #16369 that removed the backend.
"""

from __future__ import annotations

from packaging.version import InvalidVersion, Version

from smoothquant.errors import UserError

RELEASES = ("0.20.0", "0.21.0", "1.0.0", "1.0.3.2510", "1.1.0", "1.2.0", "1.2.1")
FIRST, STABLE, LAST = RELEASES[0], RELEASES[-1], "1.3.0rc20"
BASES = frozenset(Version(release) for release in (*RELEASES, "1.3.0"))  # of releases, and of their candidates
EXPECTED = f"one of {', '.join(RELEASES)}, or a candidate of those after {FIRST}, or of 1.3.0 up to rc20"


def builds_engines(version: str) -> bool:
    """Whether a version that is installed builds SmoothQuant engines."""
    try:
        return Version(FIRST) <= _without_post(Version(version)) <= Version(LAST)
    except InvalidVersion:
        return False


def check_version(version: str) -> None:
    """Raise UserError unless such a version is known here, and builds engines from these files."""
    try:
        found = Version(version)
    except InvalidVersion as error:
        raise UserError(f"TensorRT-LLM version {version!r}", expected=EXPECTED) from error
    if _without_post(found) > Version(LAST):
        raise UserError(
            f"TensorRT-LLM {version} builds no TensorRT engines (removed after {LAST}), and its PyTorch backend does "
            "not run W8A8 INT8",
            expected=EXPECTED,
            do=f"stay with {STABLE}, or serve smoothquant export w8a8 with vLLM",
        )
    if found < Version(FIRST):
        raise UserError(
            f"TensorRT-LLM {version} is older than this form of the checkpoint was checked against",
            expected=EXPECTED,
            do="take a newer release image",
        )
    if Version(found.base_version) not in BASES or found.is_devrelease or found.local:
        raise UserError(f"TensorRT-LLM {version}: no such version is known here", expected=EXPECTED)


def _without_post(version: Version) -> Version:
    """1.3.0rc20.post1 is 1.3.0rc20, mended."""
    return Version(str(version).partition(".post")[0])
