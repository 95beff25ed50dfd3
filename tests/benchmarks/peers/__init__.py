"""Our engines for CPUs beside those of others, each in a process of its own.

forms       every engine by its name, and how its folder is made
worker      a process that runs one of them in our environment; vllm_worker: in vLLM's
loop        what both speak: JSON lines on standard input and output
rounds      who is measured when
accuracy    how near each comes to the float model, on real weights
show        the tables and the picture of README.md
"""
