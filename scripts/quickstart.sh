#!/usr/bin/env bash
# Fine-tune the embedded foundation model with LoRA on 50 frames of ethanol that it has not seen.
# Installs what is needed into .venv (or $VENV), then takes under five minutes on two CPU cores.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/environment.sh
make_environment "${VENV:-.venv}"

echo "+ mace_run_train --config=configs/quickstart.yaml $*"
mace_run_train --config=configs/quickstart.yaml "$@"
