"""What several tests need: frames, models of every kind, runs of the command, adapters in files."""
