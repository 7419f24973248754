"""The epochs of a run: the order of its frames, its steps, several processes, signals."""
