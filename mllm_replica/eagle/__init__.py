"""Eagle: a mixture of vision experts."""
