"""Run a TensorRT-LLM checkpoint in PyTorch, without the exporter's code."""
