"""The adapter methods: one file each, named in `registry`."""
