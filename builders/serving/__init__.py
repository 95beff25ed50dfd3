"""Prepare engines for servers: Triton Inference Server with its own backends or TensorRT-LLM's, and trtllm-serve."""
