"""Labelled frames on their way to mace-torch: read, checked, with E0s that fit them."""
