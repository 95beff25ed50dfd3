"""TensorRT-RTX's parser and compiler on an ONNX file: does it take the graph, and what does it make of it?

`compile_onnx` does it in this process; `compile_apart` in one of its own, which gives the memory back (some three times
the weights) and which the compiler, written in C++, may bring down.
"""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, field, replace
from pathlib import Path

from builders.check.tensorrt_rtx.packages import bindings
from builders.nvidia.driver import Messages, building
from builders.nvidia.layers import EngineLayer, read_logged_layers
from builders.nvidia.profiles import Dimension, Profile
from smoothquant.errors import UserError
from smoothquant.files import scratch, write_json

NO_GPU = "Cuda Runtime"  # comes as an error once with every builder where there is no GPU
ACTIVATIONS = re.compile(r"Total Activation Memory: (\d+) bytes")
WEIGHTS = re.compile(r"Total Weights Memory: (\d+) bytes")

Symbols = Mapping[str, Sequence[Dimension]]


@dataclass(frozen=True)
class Compilation:
    """What the compiler made of a graph. No layers if there are errors, which are the parser's or the builder's.

    activation_bytes: at the largest shapes of the profile; peak_bytes: resident memory of the compiling process.
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
        """Names of the ONNX nodes that INT8 matrix products compute."""
        return frozenset(node for layer in self.layers if layer.is_matrix and layer.is_int8 for node in layer.nodes)

    def computing(self, node: str) -> tuple[EngineLayer, ...]:
        """The layers that compute an ONNX node."""
        return tuple(layer for layer in self.layers if node in layer.nodes)


def compile_onnx(path: str | Path, profile: Profile, symbols: Symbols | None = None) -> Compilation:
    """Parse and build an ONNX file, its external data beside it, in this process.

    symbols: names of the inputs' dimensions, where the profile shall go by them.
    Raises MissingPackageError without the compiler.
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
    """The same in a process of its own; without the log. Raises UserError if that process dies."""
    bindings()  # whether the packages are here is said at once
    with scratch() as place:
        result = place / "result.json"
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
    """In one line, without the one that says that there is no GPU."""
    lines = [line.strip() for line in error.splitlines() if NO_GPU not in line and not line.startswith(" (In catch")]
    return " ".join(filter(None, lines))


def _cause(returncode: int) -> str:
    if returncode == -9:
        return "(killed: out of memory, as a rule)"
    return f"(signal {-returncode})" if returncode < 0 else f"(exit status {returncode})"


def _largest(pattern: re.Pattern, messages: Sequence[str]) -> int:
    return max((int(found[1]) for text in messages if (found := pattern.search(text))), default=0)


def _main() -> None:
    """Compile as the JSON object on the command line says, and write the result."""
    task = json.loads(sys.argv[1])
    name, *ranges = task["profile"]
    made = compile_onnx(task["path"], Profile(name, *map(tuple, ranges)), task["symbols"])
    write_json(Path(task["result"]), asdict(replace(made, messages=())))


if __name__ == "__main__":
    _main()
