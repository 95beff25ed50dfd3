"""Compile an ONNX graph into a plan, with the same calls for TensorRT 10.1 to 11.

`builders.nvidia.driver` parses and builds; this module adds options, timing cache and progress. The build runs in a
thread of its own, so that Ctrl-C reaches Python during it: TensorRT is then told to stop at its next step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Any

from builders.nvidia.driver import Fault, Messages, building, in_a_line
from builders.nvidia.profiles import Profile, Shape, is_decoder_input
from builders.tensorrt import timing
from builders.tensorrt.progress import Phases
from smoothquant.errors import UserError

if TYPE_CHECKING:
    import tensorrt as trt

POLL = 0.2  # seconds between looks for Ctrl-C
GIB = 1 << 30
LEVELS = range(6)


@dataclass(frozen=True)
class Options:
    """The options of a build.

    workspace: the GiB of GPU memory that kernels may use as scratch; None for all. optimization_level: 0 (quick build)
    to 5 (quick engine). hardware_compatible: the engine runs on every GPU from Ampere on. version_compatible: the
    engine runs in later releases of this generation, too. weight_streaming: weights may stay in host memory. tf32:
    float32 products (the output head, and a float32 body) may round their operands to TF32.
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


@dataclass(frozen=True)
class Compiled:
    """The result of a build.

    plan: a buffer. warnings: TensorRT's warnings, each once. unsaved: the reason why the timing cache was not written;
    "" if it was.
    """

    plan: Any
    warnings: tuple[str, ...]
    unsaved: str = ""


def compile_graph(
    graph: Path,
    profiles: Sequence[Profile],
    options: Options,
    *,
    timing_cache: Path | None = None,
    prepare: Callable[[], None] = lambda: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Compiled:
    """The plan of a graph, with TensorRT's warnings.

    timing_cache: a file with times of kernels; it is read if it exists, and written after the build. prepare: a
    function that the building thread calls first, to choose the GPU. progress: called with (steps done, all steps).
    Raises UserError if TensorRT cannot parse the graph, refuses a profile, or builds no plan; KeyboardInterrupt after
    Ctrl-C, once TensorRT has stopped.
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
    messages = Messages()
    with building(trt, messages) as build:
        if not build.parse(graph):
            raise _not_parsed(graph, build.faults, messages)
        _check_inputs(graph, build.dynamic_inputs)
        for profile in profiles:
            if not build.add_profile(profile):
                raise UserError(f"{graph}: TensorRT refuses the {profile.name} profile {profile} ({messages.reason})")
        _configure(build.config, options)
        if timing_cache:
            timing.read(build.config, timing_cache)
        build.config.progress_monitor = _monitor(phases, stop)
        plan = build.plan()
        if plan is None:
            raise UserError(
                f"{graph}: TensorRT {trt.__version__} builds no engine ({messages.reason})",
                do="if it is out of memory, lower --max-length, --max-batch or --chunk, or limit --workspace",
            )
        unsaved = timing.write(build.config, timing_cache) if timing_cache else ""
    return Compiled(plan, tuple(messages.warnings), unsaved)


def _configure(config: trt.IBuilderConfig, options: Options) -> None:
    import tensorrt as trt

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


def _check_inputs(graph: Path, inputs: Mapping[str, Shape]) -> None:
    for name, shape in inputs.items():
        if not is_decoder_input(name, len(shape)):
            raise UserError(
                f"{graph}: input {name} has the shape {shape}",
                expected="the inputs of a decoder with a KV cache",
                do="make the export again with smoothquant export onnx",
            )


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


def _not_parsed(graph: Path, faults: Sequence[Fault], messages: Messages) -> UserError:
    where, reason = ":", messages.reason
    if faults:
        first, others = replace(faults[0], text=in_a_line(faults[0].text)), len(faults) - 1
        where = " at" if first.node else ":"
        reason = f"{first} (and {others} more)" if others else str(first)
    return UserError(
        f"{graph}: TensorRT's parser refuses it{where} {reason}",
        do="make the export again; if it is refused again, report the graph and the TensorRT version",
    )
