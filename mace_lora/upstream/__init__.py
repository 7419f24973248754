"""mace-torch as a library, and the names of its training script: the only place that imports it."""
