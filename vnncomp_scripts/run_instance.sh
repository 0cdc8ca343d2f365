#!/usr/bin/env bash
# run_instance.sh v1 CATEGORY ONNX VNNLIB RESULTS TIMEOUT: answer one instance into RESULTS.
# Exits 0 whatever the verdict. The time limit counts from the start of this script. RESULTS is replaced as a whole, so
# that it is valid at every moment, also when this script is killed. A resident worker that prepare_instance.sh has left
# does the work if it is ready and fits.
set -u
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

if [ $# -ne 6 ] || [ "$1" != v1 ]; then
    echo "usage: run_instance.sh v1 CATEGORY ONNX VNNLIB RESULTS TIMEOUT" >&2
    [ $# -ge 5 ] && printf 'error\n' >"$5"
    exit 0
fi
category="$2" onnx="$3" vnnlib="$4" results="$5" limit="$6"

# answer WORD: RESULTS becomes this verdict, at once.
answer() {
    local folder
    folder="$(dirname -- "$results")"
    mkdir -p -- "$folder"
    printf '%s\n' "$1" >"$folder/.answer.$$" && mv -fT -- "$folder/.answer.$$" "$results" || rm -f -- "$folder/.answer.$$"
}

child=""
stop() {
    [ -n "$child" ] && kill -TERM "$child" 2>/dev/null && wait "$child"
    exit 0
}
trap stop TERM INT HUP

answer unknown
"$python" -P -m verifier vnncomp run --parent $$ --configs "$tool/configs/vnncomp" -- \
    "$category" "$onnx" "$vnnlib" "$results" "$limit" &
child=$!
wait "$child" || {
    echo "run_instance.sh: the verifier did not run; see above, or set VERIFIER_PYTHON" >&2
    [ "$(head -n 1 -- "$results" 2>/dev/null)" = unknown ] && answer error
}
exit 0
