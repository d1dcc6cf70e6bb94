#!/usr/bin/env bash
# Checks the ops on this machine's GPU and times them: scripts/gpu_check.sh --help. PYTHON chooses the interpreter,
# which needs torch and pytest (default: .venv's, else python3).
set -euo pipefail
root=$(realpath "$(dirname "${BASH_SOURCE[0]}")/..")
python=${PYTHON:-$([ -x "$root/.venv/bin/python" ] && echo "$root/.venv/bin/python" || echo python3)}
command -v "$python" >/dev/null || {
    echo "gpu_check: there is no $python: set PYTHON to a Python with torch and pytest" >&2
    exit 2
}
exec "$python" "$root/scripts/gpu_check.py" "$@"
