"""A Triton model repository for a TensorRT-LLM engine. `repository` writes it; `preprocessing.py` and
`postprocessing.py` are copied into it, and run inside Triton's Python backend."""
