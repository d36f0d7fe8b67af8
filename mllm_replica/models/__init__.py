"""The parts that the papers share, and how a model is measured against the official code."""
