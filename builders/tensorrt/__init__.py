"""TensorRT engines: `build.build` makes an engine folder, `engine.TensorRTEngine` runs it.

Both need TensorRT 10.1 to 11 (from 10.8 on for ALiBi and for experts) and a GPU.

    limits.py    the sizes that an engine must take, and its optimization profiles
    hardware.py  the package, the GPU, and whether a plan fits them
    compiler.py  the build: options, timing cache and progress around `builders.nvidia.driver`
    timing.py    the timing cache, a file for the next build
    runtime.py   a plan on the GPU: context, streams, addresses
    session.py   runs of a plan, with the KV cache between them
    cache.py     the double-buffered KV cache
    kernels.py   the matrix products that became INT8 kernels, from the engine inspector
    build.py     the engine folder
    engine.py    logits and generation
    compare.py   the outputs beside those of ONNX Runtime, by Polygraphy

Only compiler.py and runtime.py import `tensorrt`, and only when they are called. Nothing is imported here: a client of
Triton's reads a manifest by record.py, without PyTorch.
"""
