"""Engines handed over to servers: Triton, and TensorRT-LLM behind Triton."""
