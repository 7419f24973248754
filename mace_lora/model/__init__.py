"""A model with adapters: which weights they change, attaching and merging them, their files."""
