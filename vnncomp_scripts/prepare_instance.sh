#!/usr/bin/env bash
# prepare_instance.sh v1 CATEGORY ONNX VNNLIB: have a resident worker ready that has read the libraries and touched the
# device, so that the instance itself need not. VERIFIER_RESIDENT_SECONDS=0: no resident worker, read the libraries only.
# Looks at no file, and always exits 0: anything else would skip the instance.
set -u
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

if [ $# -ne 4 ] || [ "$1" != v1 ]; then
    echo "usage: prepare_instance.sh v1 CATEGORY ONNX VNNLIB" >&2
    exit 0
fi
timeout --kill-after=5 120 "$python" -P -m verifier vnncomp prepare -- "$2" "$3" "$4" ||
    echo "prepare_instance.sh: the warm-up failed; the instance can run all the same" >&2
exit 0
