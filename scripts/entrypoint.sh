#!/usr/bin/env bash
# What the image runs: a script of the competition when its name comes first, else the command line.
#   entrypoint.sh run_instance.sh v1 CATEGORY ONNX VNNLIB RESULTS TIMEOUT
#   entrypoint.sh verify --onnx F --vnnlib F
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
export ORT_DISABLE_TELEMETRY=1
case "${1:-}" in
    install_tool.sh | prepare_instance.sh | run_instance.sh)
        script="$1"
        shift
        exec bash "$root/vnncomp_scripts/$script" "$@"
        ;;
esac
exec "${VERIFIER_PYTHON:-$root/.venv/bin/python}" -m verifier "$@"
