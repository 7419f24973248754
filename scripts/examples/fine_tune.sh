#!/usr/bin/env bash
# Fine-tune a foundation model on your own frames, then look at what came out:
#   scripts/examples/fine_tune.sh TRAIN.xyz TEST.xyz [FOUNDATION] [more flags of mace_run_train]
# FOUNDATION: mini (the default), a name that mace-torch downloads, or a .model file.
# Files are written to the current folder. Killed? The same command continues.
set -euo pipefail
train=$1 test=$2 base=${3:-mini}

mace_run_train --name=my_model --foundation_model="$base" \
    --adapter=full \
    --train_file="$train" --valid_fraction=0.1 --test_file="$test" \
    --batch_size=5 --max_num_epochs=100 \
    --default_dtype=float64 --restart_latest "${@:4}"

mace_lora info my_model_adapter --base "$base"
mace_lora eval --model my_model.model --data "$test" --picture parity.png
