"""mPLUG-Owl3: hyper attention over many images."""
