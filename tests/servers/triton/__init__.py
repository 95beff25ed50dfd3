"""A real tritonserver on the CPU. Its wheel holds the Python backend alone, so others stand in for NVIDIA's backends."""
