"""Code that TensorRT, TensorRT for RTX and ONNX Runtime's providers of both share. The module `trt` is an argument.

driver.py     the way from an ONNX graph to a plan: logger, parser, profiles, builder
garbage.py    Python's garbage collector, kept away from TensorRT's mutex
layers.py     the table of an engine's layers, from the engine inspector or the log
profiles.py   the shapes that an optimization profile names for a decoder's inputs
"""
