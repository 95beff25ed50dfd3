"""What servers make of what we write. Each server has an environment of its own, with its own packages.

    python -m tests.servers            make the environments that are not there yet, and run these tests
    python -m tests.servers vllm       those of one server
    python -m tests.servers vllm -- -k mixtral

An environment is made once, under ~/.cache/smoothquant-servers (or $SMOOTHQUANT_SERVERS). vLLM's takes 3.5 GB,
Triton's 0.6 GB.
"""
