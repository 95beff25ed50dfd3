"""The way from an ONNX graph to a plan: the same calls for TensorRT 10.1 to 11 and for TensorRT for RTX.

    messages = Messages()
    with building(trt, messages) as build:
        build.parse(graph)                 # False: build.faults has the reasons
        build.add_profile(profile)         # False: TensorRT refuses the profile
        build.config.set_flag(...)         # further options of the caller
        plan = build.plan()                # None: messages.reason has the reason

Typing is strong: the graph alone sets data types, and no precision flag is set. (TensorRT 11 has no other way; TensorRT
10 must be asked for it.) `trt` is the module of TensorRT or of TensorRT for RTX.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from builders.nvidia import garbage
from builders.nvidia.profiles import Dimension, Profile, Shape

if TYPE_CHECKING:
    import tensorrt

LONGEST_REASON = 400


class Messages:
    """TensorRT's messages: its errors, each warning once, and with `log` every message, VERBOSE included."""

    def __init__(self, *, log: bool = False) -> None:
        self.errors: list[str] = []
        self.warnings: dict[str, None] = {}
        self.log: list[str] | None = [] if log else None

    @property
    def reason(self) -> str:
        """The last error in one line."""
        return in_a_line(self.errors[-1]) if self.errors else "it gives no reason"


def in_a_line(text: str) -> str:
    """A message of TensorRT in one line, short enough for a sentence."""
    line = " ".join(text.split())
    return line if len(line) <= LONGEST_REASON else line[:LONGEST_REASON] + " ..."


def logger(trt: Any, messages: Messages) -> tensorrt.ILogger:
    """A logger for TensorRT that prints nothing and collects the messages."""

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            if messages.log is not None:
                messages.log.append(message)
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                messages.errors.append(message)
            elif severity == trt.ILogger.WARNING:
                messages.warnings[in_a_line(message)] = None

    return Log()


@dataclass(frozen=True)
class Fault:
    """A fault that the parser found: the ONNX node, its operator, and a sentence. node: "" for a fault of no node."""

    node: str
    operator: str
    text: str

    def __str__(self) -> str:
        return f"{self.node} ({self.operator}): {self.text}" if self.node else self.text


@contextmanager
def building(trt: Any, messages: Messages) -> Iterator[Build]:
    """A build, for the length of a block. Python's garbage collector waits, and TensorRT's objects go at its end."""
    with garbage.kept(), closing(Build(trt, messages)) as build:
        yield build


class Build:
    """The build of one graph. config: TensorRT's builder configuration, with full detail for the engine inspector."""

    def __init__(self, trt: Any, messages: Messages) -> None:
        log = logger(trt, messages)
        builder: tensorrt.Builder = trt.Builder(log)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser: tensorrt.OnnxParser = trt.OnnxParser(network, log)
        self._builder, self._network, self._parser = builder, network, parser
        self.config = builder.create_builder_config()
        self.config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # this does not slow a run

    def parse(self, graph: str | Path) -> bool:
        """Whether the parser takes a graph. The parser finds external data beside the file."""
        return self._parser.parse_from_file(str(graph))

    @property
    def faults(self) -> tuple[Fault, ...]:
        """The faults that the parser found. A refused graph may have none; the messages then have the reason."""
        errors = (self._parser.get_error(index) for index in range(self._parser.num_errors))
        return tuple(Fault(error.node_name(), error.node_operator(), error.desc()) for error in errors)

    @property
    def dynamic_inputs(self) -> Mapping[str, Shape]:
        """The inputs of varying shape, by name, with -1 for each dimension that varies."""
        tensors = (self._network.get_input(index) for index in range(self._network.num_inputs))
        return {tensor.name: tuple(tensor.shape) for tensor in tensors if -1 in tensor.shape}

    def add_profile(self, profile: Profile, symbols: Mapping[str, Sequence[Dimension]] | None = None) -> bool:
        """Whether TensorRT takes the profile. symbols: for each input the names of its dimensions, if the profile is
        to use them."""
        shapes = self._builder.create_optimization_profile()
        for name, shape in self.dynamic_inputs.items():
            named = (symbols or {}).get(name, [""] * len(shape))
            dims = [size if size >= 0 else symbol for size, symbol in zip(shape, named, strict=True)]
            shapes.set_shape(name, *profile.shapes(name, dims))
        return self.config.add_optimization_profile(shapes) >= 0

    def plan(self) -> Any:
        """The plan as a buffer; None if TensorRT builds none."""
        return self._builder.build_serialized_network(self._network, self.config)

    def close(self) -> None:
        """Release TensorRT's objects."""
        del self.config, self._parser, self._network, self._builder
