#!/bin/sh
# Creates the virtual environment and installs the project with its development tools.
# PYTHON: interpreter, 3.11 or later. VENV: folder. GPU=yes: take torch's CUDA build.
set -eu
PYTHON=${PYTHON:-python3}
VENV=${VENV:-.venv}
"$PYTHON" - <<'PY' || exit 2
import sys
if sys.version_info < (3, 11):
    sys.exit(f"Python 3.11 or later is needed; this is {sys.version.split()[0]}. Use: make PYTHON=python3.11 ...")
PY
[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
pip() { "$VENV/bin/python" -m pip --disable-pip-version-check "$@"; }
torch=$(grep '^torch==' constraints.txt)
if [ "${GPU:-}" = yes ]; then
    pip install -q -c constraints.txt "$torch"
elif ! "$VENV/bin/python" -c 'import torch' 2>/dev/null; then
    # The CPU build, from a local wheel if pip knows one, else from PyTorch's own index. Never CUDA.
    pip install -q --only-binary=:all: "$torch+cpu" 2>/dev/null ||
        pip install -q --index-url "${TORCH_CPU_INDEX:-https://download.pytorch.org/whl/cpu}" "$torch+cpu"
fi
pip install -q -c constraints.txt -e '.[dev]'
