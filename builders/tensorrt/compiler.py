"""TensorRT's side of a build: graph in, plan out. The same calls for TensorRT 10.1 to 11.

Typing is strong: the graph alone sets data types, and no precision flag is set. (In TensorRT 11 that is the only way;
in 10 it is asked for.) The build runs in a thread of its own, so that Ctrl-C reaches Python while it is under way:
TensorRT is then told to stop at its next step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

from builders.engine import garbage
from builders.tensorrt import timing
from builders.tensorrt.limits import Profile
from builders.tensorrt.progress import Phases
from smoothquant.errors import UserError

if TYPE_CHECKING:
    import tensorrt as trt

POLL = 0.2  # seconds between looks for Ctrl-C
GIB = 1 << 30
LEVELS = range(6)
LONGEST_REASON = 400


@dataclass(frozen=True)
class Options:
    """How TensorRT builds.

    workspace: GiB of GPU memory that kernels may use as scratch, None for all there is. optimization_level: 0 to 5,
    quick build to quick engine. hardware_compatible: for every GPU from Ampere on. version_compatible: for later
    releases of this generation, too. weight_streaming: weights may stay in host memory. tf32: float32 products, of
    which a float32 body and the output head consist, may round their operands to TF32.
    """

    workspace: float | None = None
    optimization_level: int = 3
    hardware_compatible: bool = False
    version_compatible: bool = False
    weight_streaming: bool = False
    tf32: bool = True

    def __post_init__(self) -> None:
        if self.optimization_level not in LEVELS:
            raise UserError(f"--optimization-level {self.optimization_level}", expected="0 to 5")
        if self.workspace is not None and not 0 < self.workspace < 2**20:  # NaN fails too
            raise UserError(f"--workspace {self.workspace}", expected="GiB of GPU memory, more than 0")

    def as_dict(self) -> dict:
        return asdict(self)


@dataclass(frozen=True)
class Compiled:
    """plan: a buffer. warnings: TensorRT's, each once. unsaved: why there is no timing cache, "" if there is."""

    plan: Any
    warnings: tuple[str, ...]
    unsaved: str = ""


class _Messages:
    """What a build or a run has to say: errors, and warnings once each."""

    def __init__(self) -> None:
        self.errors: list[str] = []
        self.warnings: dict[str, None] = {}

    @property
    def reason(self) -> str:
        """The last error, in a line."""
        return in_a_line(self.errors[-1]) if self.errors else "it gives no reason"


def in_a_line(text: str) -> str:
    """A message of TensorRT's, short enough to stand in a sentence."""
    line = " ".join(text.split())
    return line if len(line) <= LONGEST_REASON else line[:LONGEST_REASON] + " ..."


def logger() -> tuple[trt.ILogger, _Messages]:
    """A logger for TensorRT that prints nothing, and what it has heard."""
    import tensorrt as trt

    messages = _Messages()

    class Log(trt.ILogger):
        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                messages.errors.append(message)
            elif severity == trt.ILogger.WARNING:
                messages.warnings[in_a_line(message)] = None

    return Log(), messages


def compile_graph(
    graph: Path,
    profiles: Sequence[Profile],
    options: Options,
    *,
    timing_cache: Path | None = None,
    prepare: Callable[[], None] = lambda: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Compiled:
    """Build a plan. prepare: run first in the thread that builds, to choose the GPU.

    timing_cache: a file with times of kernels, read if it is there and written with what was measured.
    Raises UserError if TensorRT cannot parse the graph, takes no such profile, or builds no plan; KeyboardInterrupt,
    when TensorRT has stopped.
    """
    stop = Event()
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="tensorrt") as pool:
        future = pool.submit(_compile, graph, profiles, options, timing_cache, prepare, Phases(progress), stop)
        try:
            while not wait([future], POLL).done:
                pass
        except KeyboardInterrupt:
            stop.set()
            raise
    return future.result()


@garbage.kept()
def _compile(
    graph: Path,
    profiles: Sequence[Profile],
    options: Options,
    timing_cache: Path | None,
    prepare: Callable[[], None],
    phases: Phases,
    stop: Event,
) -> Compiled:
    import tensorrt as trt

    prepare()
    log, messages = logger()
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(graph)):  # finds external data beside the file
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        raise _not_parsed(graph, [(e.node_name(), e.node_operator(), e.desc()) for e in errors], messages)
    config = builder.create_builder_config()
    _configure(config, options)
    for profile in profiles:
        shapes = builder.create_optimization_profile()
        for name, (least, usual, most) in _inputs(graph, network, profile).items():
            shapes.set_shape(name, least, usual, most)
        if config.add_optimization_profile(shapes) < 0:
            raise UserError(f"{graph}: TensorRT takes no {profile.name} profile like {profile} ({messages.reason})")
    if timing_cache:
        timing.read(config, timing_cache)
    config.progress_monitor = _monitor(phases, stop)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise UserError(
            f"{graph}: TensorRT {trt.__version__} builds no engine ({messages.reason})",
            do="if it is out of memory, lower --max-length, --max-batch or --chunk, or limit --workspace",
        )
    unsaved = timing.write(config, timing_cache) if timing_cache else ""
    return Compiled(plan, tuple(messages.warnings), unsaved)


def _configure(config: trt.IBuilderConfig, options: Options) -> None:
    import tensorrt as trt

    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # for the engine inspector; runs are as quick
    config.builder_optimization_level = options.optimization_level
    if options.workspace is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, int(options.workspace * GIB))
    if options.hardware_compatible:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if options.weight_streaming:
        config.set_flag(trt.BuilderFlag.WEIGHT_STREAMING)
    if not options.tf32:
        config.clear_flag(trt.BuilderFlag.TF32)


def _inputs(graph: Path, network: trt.INetworkDefinition, profile: Profile) -> Mapping[str, tuple]:
    found = {}
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        shapes = profile.shapes(tensor.name, tuple(tensor.shape))
        if shapes is None:
            raise UserError(
                f"{graph}: input {tensor.name} of shape {tuple(tensor.shape)}",
                expected="the inputs of a decoder with a KV cache",
                do="make the export again with smoothquant export onnx",
            )
        found[tensor.name] = shapes
    return found


def _monitor(phases: Phases, stop: Event) -> trt.IProgressMonitor:
    import tensorrt as trt

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            phases.start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            phases.step(phase_name, step)
            return not stop.is_set()

        def phase_finish(self, phase_name: str) -> None:
            phases.finish(phase_name)

    return Monitor()


def _not_parsed(graph: Path, errors: Sequence[tuple[str, str, str]], messages: _Messages) -> UserError:
    """errors: node, operator and description of each."""
    if errors:
        (node, operator, description), *others = errors
        where = f"{node} ({operator}): " if node else ""
        more = f", and {len(others)} errors more" if others else ""
        reason = f"{where}{in_a_line(description)}{more}"
    else:
        reason = messages.reason
    return UserError(
        f"{graph}: TensorRT's parser refuses it at {reason}"
        if errors and errors[0][0]
        else f"{graph}: TensorRT's parser refuses it: {reason}",
        do="make the export again; if it is refused again, report the graph and the TensorRT version",
    )
