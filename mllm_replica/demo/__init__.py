"""A conversation with a saved model, in the terminal and on a page of this machine."""
