"""The vision experts of Eagle."""
