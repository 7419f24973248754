#!/usr/bin/env bash
# Reproduce published tables: scripts/reproduce.sh rmd17 aspirin --adapter=mmea; --help says more.
# Installs what is needed into .venv (or $VENV). Interrupted, the same command continues.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh
make_environment "${VENV:-.venv}"
exec python scripts/reproduce.py "$@"
