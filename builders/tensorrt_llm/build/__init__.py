"""Build TensorRT-LLM engines: the command, the machine that runs it, and the engine folder."""
