"""Whether a fine-tuned model can be trusted away from its training frames: checks, and frames."""
