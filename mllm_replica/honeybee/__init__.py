"""Honeybee: projectors that keep places."""
