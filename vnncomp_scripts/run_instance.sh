#!/usr/bin/env bash
# run_instance.sh v1 CATEGORY ONNX VNNLIB RESULTS TIMEOUT: answer one instance into RESULTS.
# Exits 0 whatever the verdict. The time limit counts from the start of this script. RESULTS is replaced as a whole, so
# that it is valid at every moment, also when this script is killed; where that cannot be (several names, a folder that
# takes no new file) it is written in place, and a pipe or a device gets the verdict alone. What RESULTS held before is
# gone at once. Exits 1 only when that fails. A resident worker that prepare_instance.sh has left does the work if it is
# ready and fits.
set -u
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

say() { echo "run_instance.sh: $*" >&2; }

# Whether RESULTS is a pipe, a device or the like, which takes one word and forgets none.
is_stream() { [ -e "$results" ] && [ ! -f "$results" ] && [ ! -d "$results" ]; }

# replace WORD: put a new file with this verdict in the place of RESULTS, links followed.
replace() {
    local target="$results" folder=. facts mode=644 new
    case "$results" in /dev/* | /proc/*) return 1 ;; esac
    if [ -L "$results" ]; then target="$(readlink -f -- "$results")" || return 1; fi
    if [ -e "$target" ]; then
        facts="$([ -f "$target" ] && stat -c '%h %u %a' -- "$target")"
        [ "${facts% *}" = "1 $EUID" ] || return 1
        mode="${facts##* }"
    fi
    case "$target" in */*) folder="${target%/*}" ;; esac
    new="$(mktemp -- "$folder/.answer.XXXXXXXXXX" 2>/dev/null)" || return 1
    { printf '%s\n' "$1" >"$new"; } 2>/dev/null && chmod -- "$mode" "$new" && mv -fT -- "$new" "$target" 2>/dev/null &&
        return 0
    rm -f -- "$new"
    return 1
}

# overwrite WORD: write into what is there; makes no file and never waits for long.
overwrite() { (set -o pipefail; printf '%s\n' "$1" | timeout 0.3 dd of="$results" conv=nocreat status=none 2>/dev/null); }

# forget: empty RESULTS, or remove it; succeeds when nothing of it is left.
forget() {
    [ ! -f "$results" ] || truncate -c -s 0 -- "$results" 2>/dev/null || rm -f -- "$(readlink -f -- "$results")" 2>/dev/null
}

# answer WORD: RESULTS becomes this verdict, at once; when that cannot be, nothing of what it was stays, or exit 1.
answer() {
    replace "$1" || overwrite "$1" && return
    if ! forget; then
        say "cannot write $results, and what it held before is still there"
        exit 1
    fi
    say "cannot write $results"
}

if [ $# -ne 6 ] || [ "$1" != v1 ]; then
    echo "usage: run_instance.sh v1 CATEGORY ONNX VNNLIB RESULTS TIMEOUT" >&2
    results="${5:-}"
    [ $# -ge 5 ] && answer error
    exit 0
fi
category="$2" onnx="$3" vnnlib="$4" results="$5" limit="$6"

child=""
stop() {
    [ -n "$child" ] && kill -TERM "$child" 2>/dev/null && wait "$child"
    exit 0
}
trap stop TERM INT HUP

folder="$(dirname -- "$results")"
[ -d "$folder" ] || { mkdir -p -- "$folder" && say "made the folder $folder"; }
is_stream || answer unknown
"$python" -P -m verifier vnncomp run --parent $$ --configs "$tool/configs/vnncomp" -- \
    "$category" "$onnx" "$vnnlib" "$results" "$limit" &
child=$!
wait "$child" || {
    say "the verifier did not run or could not write $results; see above, or set VERIFIER_PYTHON"
    case "$(is_stream || head -n 1 -- "$results" 2>/dev/null)" in unknown | "") answer error ;; esac
}
exit 0
