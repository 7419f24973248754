"""The doors for Python: adapters in files, several adapters of one base, extraction, ASE."""
