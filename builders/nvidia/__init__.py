"""What TensorRT, TensorRT for RTX and ONNX Runtime's providers of both have in common. `trt` is always an argument.

driver.py     the way from an ONNX graph to a plan: logger, parser, profiles, builder
garbage.py    Python's garbage collector, kept away from TensorRT's mutex
layers.py     the table of an engine's layers, as the engine inspector or the log has it
profiles.py   the shapes that an optimization profile names for a decoder's inputs
"""
