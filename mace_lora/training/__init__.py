"""One run of mace-torch's training script: `run` has its order, `session` what it calls back."""
