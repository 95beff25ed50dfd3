"""Compile an ONNX file with TensorRT-RTX: does the compiler take the graph, and which kernels does it choose?

`compile_onnx` compiles in this process. `compile_apart` compiles in a process of its own: its memory (some three times
the weights) is given back afterwards, and a crash of the compiler, which is C++, ends that process alone.
"""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, field, replace
from pathlib import Path

from builders.check.tensorrt_rtx.packages import bindings
from builders.nvidia.driver import Messages, building
from builders.nvidia.layers import EngineLayer, read_logged_layers
from builders.nvidia.profiles import Dimension, Profile
from smoothquant.errors import UserError

NO_GPU = "Cuda Runtime"  # every builder reports one error with these words where there is no GPU
ACTIVATIONS = re.compile(r"Total Activation Memory: (\d+) bytes")
WEIGHTS = re.compile(r"Total Weights Memory: (\d+) bytes")

Symbols = Mapping[str, Sequence[Dimension]]


@dataclass(frozen=True)
class Compilation:
    """The compiler's result for one graph: the layers of the engine, or the errors of the parser or builder.

    plan_bytes, weight_bytes: the sizes of the plan and of the weights in it. activation_bytes: the memory for
    activations at the largest shapes of the profile. peak_bytes: the largest resident memory of the compiling process.
    seconds: the time of parsing and building. version: the version of TensorRT-RTX.
    """

    layers: tuple[EngineLayer, ...] = ()
    errors: tuple[str, ...] = ()
    plan_bytes: int = 0
    weight_bytes: int = 0
    activation_bytes: int = 0
    peak_bytes: int = 0
    seconds: float = 0.0
    version: str = ""
    messages: tuple[str, ...] = field(default=(), repr=False)  # the whole log, VERBOSE included

    def int8_nodes(self) -> frozenset[str]:
        """Names of the ONNX nodes that INT8 kernels compute as matrix products."""
        return frozenset(node for layer in self.layers if layer.is_matrix and layer.is_int8 for node in layer.nodes)

    def computing(self, node: str) -> tuple[EngineLayer, ...]:
        """The layers that compute an ONNX node."""
        return tuple(layer for layer in self.layers if node in layer.nodes)


def compile_onnx(path: str | Path, profile: Profile, symbols: Symbols | None = None) -> Compilation:
    """The compiler's result for an ONNX file, whose external data lie beside it. It runs in this process.

    profile: the shapes of the inputs. symbols: for each input the names of its dimensions, if the profile is to use
    them. Raises MissingPackageError without the compiler.
    """
    trt, start, messages = bindings(), time.monotonic(), Messages(log=True)
    plan, faults = None, tuple[str, ...]()
    with building(trt, messages) as build:
        if not build.parse(path):
            faults = tuple(map(str, build.faults))
        elif build.add_profile(profile, symbols):
            plan = build.plan()
    log = tuple(messages.log or ())
    made = Compilation(version=trt.__version__, seconds=time.monotonic() - start, messages=log)
    made = replace(made, peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
    if plan is None:
        errors = faults or (error for error in messages.errors if NO_GPU not in error)
        return replace(made, errors=tuple(map(_plain, errors)) or ("the compiler gives no reason",))
    return replace(
        made,
        layers=read_logged_layers(log),
        plan_bytes=plan.nbytes,
        weight_bytes=_largest(WEIGHTS, log),
        activation_bytes=_largest(ACTIVATIONS, log),
    )


def compile_apart(path: str | Path, profile: Profile, symbols: Symbols | None = None) -> Compilation:
    """The result of `compile_onnx`, from a process of its own and without the log.

    Raises UserError if that process dies, MissingPackageError without the compiler.
    """
    bindings()  # a missing package is reported at once
    with tempfile.TemporaryDirectory() as scratch:
        result = Path(scratch) / "result.json"
        task = {"path": str(path), "profile": astuple(profile), "symbols": symbols or {}, "result": str(result)}
        command = [sys.executable, "-m", __name__, json.dumps(task)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode or not result.exists():
            raise UserError(
                f"{path}: the TensorRT-RTX compiler died {_cause(done.returncode)}",
                expected="a graph that it takes or refuses",
                do="see what smoothquant check says without --compiler, or give the machine more memory",
            )
        content = json.loads(result.read_text(encoding="utf-8"))
    layers = tuple(_as_layer(layer) for layer in content.pop("layers"))
    return Compilation(layers, tuple(content.pop("errors")), **content | {"messages": ()})


def _as_layer(content: dict) -> EngineLayer:
    return EngineLayer(**content | {key: tuple(content[key]) for key in ("inputs", "outputs", "nodes")})


def _plain(error: str) -> str:
    """An error of the compiler in one line, without the lines about a missing GPU."""
    lines = [line.strip() for line in error.splitlines() if NO_GPU not in line and not line.startswith(" (In catch")]
    return " ".join(filter(None, lines))


def _cause(returncode: int) -> str:
    if returncode == -9:
        return "(killed, most likely for lack of memory)"
    return f"(signal {-returncode})" if returncode < 0 else f"(exit status {returncode})"


def _largest(pattern: re.Pattern, messages: Sequence[str]) -> int:
    return max((int(found[1]) for text in messages if (found := pattern.search(text))), default=0)


def _main() -> None:
    """Compile the graph that the JSON object on the command line describes, and write the result as JSON."""
    task = json.loads(sys.argv[1])
    name, *ranges = task["profile"]
    made = compile_onnx(task["path"], Profile(name, *map(tuple, ranges)), task["symbols"])
    Path(task["result"]).write_text(json.dumps(asdict(replace(made, messages=()))), encoding="utf-8")


if __name__ == "__main__":
    _main()
