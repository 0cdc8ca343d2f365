#!/usr/bin/env bash
# Proves one example, refutes another and checks the counterexample: the shortest look at the verifier.
#   PYTHON=.venv/bin/python scripts/demo.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python="${PYTHON:-.venv/bin/python}"
scratch="$(mktemp -d)"
trap 'rm -rf "$scratch"' EXIT

# ask NETWORK PROPERTY EXPECTED: answers one query and insists on the verdict that is known for the example.
ask() {
    local begin=$SECONDS verdict
    head -n 1 "examples/$2.vnnlib"
    echo "\$ verifier verify --onnx examples/$1.onnx --vnnlib examples/$2.vnnlib --results-file result.txt"
    verdict="$("$python" -m verifier verify --onnx "examples/$1.onnx" --vnnlib "examples/$2.vnnlib" --timeout 60 \
        --results-file "$scratch/result.txt")"
    echo "$verdict    ($((SECONDS - begin)) s)"
    if [ "$verdict" != "$3" ]; then
        echo "demo: expected $3 for $2" >&2
        exit 1
    fi
}

ask rings rings_inner unsat
echo
ask rings rings_outer sat
cat "$scratch/result.txt"
echo "\$ verifier check --onnx examples/rings.onnx --vnnlib examples/rings_outer.vnnlib --results-file result.txt"
"$python" -m verifier check --onnx examples/rings.onnx --vnnlib examples/rings_outer.vnnlib \
    --results-file "$scratch/result.txt"
