"""Published tables, claims, our results and how both are shown."""
