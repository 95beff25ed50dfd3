#!/usr/bin/env bash
# after-nvidia COMMAND ...: the entry point of NVIDIA's image, then a command. NVIDIA's makes the driver's compatibility
# libraries findable and warns of drivers that are too old. It prints a banner on the standard output, which belongs to
# the command (--json): the banner goes to the standard error.
set -euo pipefail

first=${NVIDIA_ENTRYPOINT:-/opt/nvidia/nvidia_entrypoint.sh}
[[ -x $first ]] || exec "$@"
exec 3>&1
# shellcheck disable=SC2016 # the inner bash expands it
exec "$first" bash -c 'exec "$@" >&3 3>&-' bash "$@" >&2
