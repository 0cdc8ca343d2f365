# Sourced by the three scripts: where the tool is and which Python runs it. No script changes the working directory, so
# relative paths mean what the caller means. Call as: "$python" -P -m verifier ... (-P keeps the caller's folder off the
# module path; the source tree runs in place).

tool="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
export PYTHONPATH="$tool${PYTHONPATH:+:$PYTHONPATH}"
export ORT_DISABLE_TELEMETRY=1 # onnxruntime reads it while it is imported

# Sets $python: $VERIFIER_PYTHON, the environment next to the tool, or the one on the path.
find_python() {
    if [ -n "${VERIFIER_PYTHON:-}" ]; then
        python="$VERIFIER_PYTHON"
    elif [ -x "$tool/.venv/bin/python" ]; then
        python="$tool/.venv/bin/python"
    else
        python=python3
    fi
}
find_python
