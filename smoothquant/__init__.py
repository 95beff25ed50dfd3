"""SmoothQuant for decoders: smoothing and W8A8 quantization of a checkpoint, layer by layer.

The package holds the method, without formats or engines. `stream` is its entry. `smoothing` and `quantization` hold the
mathematics, `family` the schema of an architecture. `checkpoint` and `model` read a checkpoint, `decoder` runs it in
PyTorch.
"""

__version__ = "0.1.0"
