"""Interruptions of the command line at every operation on files: killed, a write done by half, a loss of power.

python -m tests.crash                 every point of every scenario
python -m tests.crash --sample 20     some of each
"""
