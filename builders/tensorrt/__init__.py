"""TensorRT engines: `build` makes the folder, `TensorRTEngine` runs it. TensorRT 10.1 to 11, an NVIDIA GPU.

    limits.py    what an engine must hold, and the optimization profiles that follow
    hardware.py  the package, the GPU, and whether a plan fits them
    compiler.py  the build: options, timing cache, progress, around `builders.nvidia.driver`
    timing.py    times of kernels, kept for the next build
    runtime.py   TensorRT's side of a run: plan, context, streams
    kernels.py   which matrix products became INT8 kernels, by the engine inspector
    build.py     the engine folder
    engine.py    logits and generation, with a double-buffered KV cache
    compare.py   the outputs beside ONNX Runtime's, by Polygraphy

Only compiler.py and runtime.py import `tensorrt`, and only when they are called.
"""

from builders.tensorrt.build import build
from builders.tensorrt.compiler import Options
from builders.tensorrt.engine import TensorRTEngine
from builders.tensorrt.limits import Limits

__all__ = ["Limits", "Options", "TensorRTEngine", "build"]
