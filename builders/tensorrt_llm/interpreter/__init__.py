"""A TensorRT-LLM checkpoint run in PyTorch, without the exporter's code."""
