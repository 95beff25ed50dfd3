"""A real tritonserver on the CPU. Its wheel has one backend, for Python; programs here stand in for NVIDIA's."""
