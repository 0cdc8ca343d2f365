#!/usr/bin/env bash
# Installs the verifier into a virtual environment. The Makefile, the Dockerfile and the competition's
# install script all come through here, so that there is one way to install.
#
#   scripts/install.sh [--venv DIR] [--dev] [--editable] [--torch-index URL] [--python PYTHON] [--dry-run]
#
#   --venv DIR         where (default .venv beside this folder); made when missing
#   --dev              also what the tests, linters and the type check need
#   --editable         use the source tree in place
#   --torch-index URL  take torch and torchvision from this package index first (for CPU-only or other CUDA builds)
#   --python PYTHON    interpreter that makes the environment (default: the first of python3.13 ... python3.11, python3)
#   --dry-run          print the commands only
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="$root/.venv" extras="" editable="" index="" python="" dry=""

usage() { sed -n '2,/^set /p' "${BASH_SOURCE[0]}" | sed '$d; s/^# \{0,1\}//'; }
fail() { echo "install.sh: $*" >&2; exit 2; }

while [ $# -gt 0 ]; do
    case "$1" in
        --venv) venv="${2:?--venv needs a folder}"; shift ;;
        --dev) extras="[dev]" ;;
        --editable) editable=1 ;;
        --torch-index) index="${2?--torch-index needs an address}"; shift ;;
        --python) python="${2:?--python needs an interpreter}"; shift ;;
        --dry-run) dry=1 ;;
        -h | --help) usage; exit 0 ;;
        *) fail "unknown argument '$1'; see --help" ;;
    esac
    shift
done

run() {
    printf '+ %s\n' "$*" >&2
    [ -n "$dry" ] || "$@"
}

# Sets $python to an interpreter of a version that the package supports.
choose_python() {
    local candidate
    for candidate in ${python:-python3.13 python3.12 python3.11 python3}; do
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            python="$candidate"
            return
        fi
    done
    fail "no Python 3.11 or newer with the venv module found (Debian: apt-get install python3 python3-venv); use --python"
}

if [ ! -x "$venv/bin/python" ]; then
    choose_python
    run "$python" -m venv "$venv"
fi

if [ -n "$index" ]; then
    run "$venv/bin/python" -m pip install -qq --index-url "$index" torch torchvision
fi
if [ -n "$editable" ]; then
    run "$venv/bin/python" -m pip install -qq --editable "$root$extras"
else
    run "$venv/bin/python" -m pip install -qq "$root$extras"
fi
echo "installed in $venv" >&2
