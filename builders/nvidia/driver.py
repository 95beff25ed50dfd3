"""The way from an ONNX graph to a plan: the same calls for TensorRT 10.1 to 11 and for TensorRT for RTX.

    messages = Messages()
    with building(trt, messages) as build:
        build.parse(graph)                 # False: see build.faults
        build.add_profile(profile)         # False: refused
        build.config.set_flag(...)         # what the caller wants beyond
        plan = build.plan()                # None: see messages.reason

Typing is strong: the graph alone sets data types, and no precision flag is set. (In TensorRT 11 that is the only way;
in 10 it is asked for.) `trt` is the module, whichever of them it is.
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
    """What TensorRT has said: its errors, its warnings once each, and with `log` every message, VERBOSE included."""

    def __init__(self, *, log: bool = False) -> None:
        self.errors: list[str] = []
        self.warnings: dict[str, None] = {}
        self.log: list[str] | None = [] if log else None

    @property
    def reason(self) -> str:
        """The last error, in a line."""
        return in_a_line(self.errors[-1]) if self.errors else "it gives no reason"


def in_a_line(text: str) -> str:
    """A message of TensorRT's, short enough to stand in a sentence."""
    line = " ".join(text.split())
    return line if len(line) <= LONGEST_REASON else line[:LONGEST_REASON] + " ..."


def logger(trt: Any, messages: Messages) -> tensorrt.ILogger:
    """A logger for TensorRT that prints nothing and adds what it hears to the messages."""

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
    """What the parser does not take: the ONNX node, its operator, and a sentence. node: "" where it is none."""

    node: str
    operator: str
    text: str

    def __str__(self) -> str:
        return f"{self.node} ({self.operator}): {self.text}" if self.node else self.text


@contextmanager
def building(trt: Any, messages: Messages) -> Iterator[Build]:
    """A build, while Python's garbage waits. TensorRT's objects are gone when the block ends."""
    with garbage.kept(), closing(Build(trt, messages)) as build:
        yield build


class Build:
    """One graph on its way to a plan. config: TensorRT's, with all that an engine inspector can tell switched on."""

    def __init__(self, trt: Any, messages: Messages) -> None:
        log = logger(trt, messages)
        builder: tensorrt.Builder = trt.Builder(log)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser: tensorrt.OnnxParser = trt.OnnxParser(network, log)
        self._builder, self._network, self._parser = builder, network, parser
        self.config = builder.create_builder_config()
        self.config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # runs are as quick

    def parse(self, graph: str | Path) -> bool:
        """Whether the parser takes a graph. It finds external data beside the file."""
        return self._parser.parse_from_file(str(graph))

    @property
    def faults(self) -> tuple[Fault, ...]:
        """What the parser found. There may be none in a graph that it refuses: the messages then have the reason."""
        errors = (self._parser.get_error(index) for index in range(self._parser.num_errors))
        return tuple(Fault(error.node_name(), error.node_operator(), error.desc()) for error in errors)

    @property
    def dynamic_inputs(self) -> Mapping[str, Shape]:
        """The inputs of the graph whose shapes vary, with -1 where they do."""
        tensors = (self._network.get_input(index) for index in range(self._network.num_inputs))
        return {tensor.name: tuple(tensor.shape) for tensor in tensors if -1 in tensor.shape}

    def add_profile(self, profile: Profile, symbols: Mapping[str, Sequence[Dimension]] | None = None) -> bool:
        """Whether TensorRT takes the profile. symbols: names of the inputs' dimensions, where it shall go by them."""
        shapes = self._builder.create_optimization_profile()
        for name, shape in self.dynamic_inputs.items():
            named = (symbols or {}).get(name, [""] * len(shape))
            dims = [size if size >= 0 else symbol for size, symbol in zip(shape, named, strict=True)]
            shapes.set_shape(name, *profile.shapes(name, dims))
        return self.config.add_optimization_profile(shapes) >= 0

    def plan(self) -> Any:
        """The plan, a buffer. None if TensorRT builds none."""
        return self._builder.build_serialized_network(self._network, self.config)

    def close(self) -> None:
        """Let TensorRT's objects go."""
        del self.config, self._parser, self._network, self._builder
