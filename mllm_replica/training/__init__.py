"""Optimiser, checkpoints, the training loop, and what small models start from."""
