"""One run of mace-torch's training script: `run` has its order, `record` what is known of it."""
