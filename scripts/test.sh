#!/usr/bin/env bash
# Check the style and the types, and run the whole test suite, in an environment of its own (.venv, or $VENV).
# Arguments go to pytest: scripts/test.sh -m "not slow". WORKERS=1 runs one test at a time.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh
make_environment "${VENV:-.venv}" test

ruff check .
ruff format --check .
mypy
python -m pytest -q -n "${WORKERS:-2}" --dist loadscope --durations=10 "$@"
