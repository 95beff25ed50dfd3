#!/usr/bin/env bash
# What only a GPU can tell, in four tiers of at most 8 minutes each, and one table at the end. A tier that fails, or that
# lacks something, stops no other. From a clone of the repository, which is mounted:
#
#   docker run --rm --gpus all --user "$(id -u):$(id -g)" -v "$PWD:/src" \
#       --entrypoint after-nvidia smoothquant-tensorrt /src/docker/tensorrt/gpu_check.sh
#
# torch needs neither TensorRT nor this image; the others are forms, overflow and speed (tests/gpu/tiers.py). The names of
# tiers as arguments run only these; `--device cpu torch` shows that the first one runs, on any machine. What was measured
# is left in tests/benchmarks/results/tensorrt_sm80.json (A100) or tensorrt_sm90.json (H100), of which
# `python -m tests.benchmarks.tables` makes the table in docker/README.md.
set -uo pipefail
cd "$(dirname "$0")/../.." || exit

nvidia-smi --query-gpu=name,compute_cap,driver_version --format=csv || echo "nvidia-smi tells of no GPU"
export PYTHONPATH=$PWD PYTHONDONTWRITEBYTECODE=1 HF_HUB_OFFLINE=1
exec python3 -m tests.gpu "$@"
