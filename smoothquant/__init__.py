"""SmoothQuant for decoders: smoothing and W8A8 quantization of a checkpoint, layer by layer.

The method without formats or engines. `stream` is the way in; `smoothing` and `quantization` hold the mathematics,
`family` the schema of an architecture, `checkpoint` and `model` the reading, `decoder` the arithmetic in PyTorch.
"""

__version__ = "0.1.0"
