"""TensorRT-LLM engines: the command that builds one, where it runs, and the folder that it leaves."""
