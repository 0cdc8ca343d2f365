#!/usr/bin/env bash
# install_tool.sh v1: install the verifier into .venv next to it, once per machine.
# With VERIFIER_PYTHON set, that interpreter is used as it is and nothing is installed.
# VERIFIER_TORCH_INDEX names another package index for torch (a CPU-only or other CUDA build).
set -u
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

if [ "${1:-}" != v1 ]; then
    echo "install_tool.sh: expected version v1, got '${1:-}'; continuing" >&2
fi
if [ -z "${VERIFIER_PYTHON:-}" ]; then
    index=()
    [ -n "${VERIFIER_TORCH_INDEX:-}" ] && index=(--torch-index "$VERIFIER_TORCH_INDEX")
    "$tool/scripts/install.sh" --venv "$tool/.venv" --editable "${index[@]}" || {
        echo "install_tool.sh: installing into $tool/.venv failed, see above" >&2
        exit 1
    }
    # Byte code now, so that the first instance does not pay for it.
    find_python
    "$python" -m compileall -q "$tool/verifier" "$tool"/.venv/lib/python*/site-packages >/dev/null 2>&1
fi
"$python" -P -m verifier doctor || echo "install_tool.sh: the self-test failed, see above" >&2
exit 0
