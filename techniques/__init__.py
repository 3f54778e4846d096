"""Techniques: one folder each, with its slot implementations, its config and its README."""
