#!/usr/bin/env bash
# Fills a container image: scripts/image.sh cpu|cuda VENV [--dry-run]
#   cuda  torch as the package index serves it, which brings CUDA along and also runs on a CPU
#   cpu   torch without CUDA, from $TORCH_CPU_INDEX
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
variant="${1:-}" venv="${2:-}" dry="${3:-}"
cpu_index="${TORCH_CPU_INDEX:-https://download.pytorch.org/whl/cpu}"

case "$variant" in
    cpu) options=(--torch-index "$cpu_index") ;;
    cuda) options=() ;;
    *) echo "image.sh: the variant is '$variant'; use cpu or cuda" >&2; exit 2 ;;
esac
[ -n "$venv" ] || { echo "image.sh: name the folder of the environment" >&2; exit 2; }

"$root/scripts/install.sh" --venv "$venv" --editable "${options[@]}" ${dry:+"$dry"}
[ -n "$dry" ] && exit 0
# Byte code now: the first query should not pay for it, and a read-only image could never keep it.
"$venv/bin/python" -m compileall -q "$root/verifier" "$venv"/lib/python*/site-packages >/dev/null || true
"$venv/bin/python" -m verifier doctor
