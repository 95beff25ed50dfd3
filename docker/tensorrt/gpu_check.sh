#!/usr/bin/env bash
# What only a GPU can tell: an engine's outputs beside ONNX Runtime's, INT8 kernels, overflow of FP16 scales, and times
# of INT8 and FP16 engines for prefill and decode. From a clone of the repository, which is mounted:
#
#   docker run --rm --gpus all --user "$(id -u):$(id -g)" -v "$PWD:/src" \
#       --entrypoint /src/docker/tensorrt/gpu_check.sh smoothquant-tensorrt
#
# Options go to the timing: --hidden 4096 --layers 4 --prefill 512 --repeats 7. What was measured is left in
# tests/benchmarks/results/tensorrt_sm80.json (A100) or tensorrt_sm90.json (H100), of which
# `python -m tests.benchmarks.tables` makes the table in docker/README.md.
set -euo pipefail
cd "$(dirname "$0")/../.."

nvidia-smi --query-gpu=name,compute_cap,driver_version --format=csv
python3 -m pip install --quiet --target /tmp/gpu_check -c constraints.txt pytest hypothesis
export PYTHONPATH=$PWD:/tmp/gpu_check HF_HUB_OFFLINE=1

python3 -m pytest -p no:cacheprovider -m gpu -v tests/gpu
python3 -m tests.benchmarks.tensorrt_speed "$@"
