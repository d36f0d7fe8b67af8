"""What a run would cost, and whether this machine can do it."""
