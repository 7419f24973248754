"""What a run writes: checkpoints to go on from, and models and adapters at its end."""
