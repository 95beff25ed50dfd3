"""What a TensorRT-LLM checkpoint is: its configuration, its tensors, and the rules that its loader and builder have."""
