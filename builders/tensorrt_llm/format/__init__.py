"""The format of TensorRT-LLM checkpoints: configuration, tensors, and the rules of its loader and builder."""
