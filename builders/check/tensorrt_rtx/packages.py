"""Find the packages of the TensorRT-RTX compiler, load their libraries and import their Python module.

The package onnxruntime-ep-nv-tensorrt-rtx-cu13 holds the compiler and its ONNX parser. The package
tensorrt_rtx_cu13_bindings holds their Python module, `tensorrt_rtx_bindings`. Both are for Linux x86-64. Compiling
needs no GPU; running an engine needs one.
"""

from __future__ import annotations

import ctypes
import platform
import sys
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from smoothquant.errors import MissingPackageError

LIBRARIES, BINDINGS = "onnxruntime_ep_nv_tensorrt_rtx", "tensorrt_rtx_bindings"
PACKAGES = {LIBRARIES: "onnxruntime-ep-nv-tensorrt-rtx-cu13", BINDINGS: "tensorrt_rtx_cu13_bindings"}
VERSIONS = "onnxruntime-ep-nv-tensorrt-rtx-cu13==0.5.0 tensorrt_rtx_cu13_bindings==1.7.1.116"  # both are 1.7.1
FILES = ("libtensorrt_rtx.so.*", "libtensorrt_onnxparser_rtx.so.*")  # the second needs the first


def available() -> bool:
    """Whether the packages are installed. Nothing is imported."""
    return all(find_spec(module) for module in PACKAGES)


@cache
def bindings() -> Any:
    """The Python module. Raises MissingPackageError, which says what to install."""
    missing = [package for module, package in PACKAGES.items() if not find_spec(module)]
    if missing:
        where = "" if (sys.platform, platform.machine()) == ("linux", "x86_64") else " (which are for Linux x86-64)"
        raise MissingPackageError(
            f"the TensorRT-RTX compiler needs {' and '.join(missing)}{where}", do=f"pip install {VERSIONS}"
        )
    spec = find_spec(LIBRARIES)
    assert spec is not None
    assert spec.origin is not None
    try:
        for pattern in FILES:  # the bindings look for the libraries by soname, so they find those that are loaded
            for path in sorted(Path(spec.origin).parent.glob(pattern))[-1:]:
                ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)
        return import_module(BINDINGS)
    except (ImportError, OSError) as error:
        raise MissingPackageError(
            f"the TensorRT-RTX compiler does not load ({error})",
            expected="both packages of one version",
            do=f"pip install {VERSIONS}",
        ) from error
