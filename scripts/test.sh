#!/usr/bin/env bash
# Check the style and run the whole test suite, in an environment of its own (.venv, or $VENV).
# Arguments go to pytest: scripts/test.sh -m "not slow"
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh
make_environment "${VENV:-.venv}" test

ruff check .
ruff format --check .
python -m pytest -q --durations=10 "$@"
