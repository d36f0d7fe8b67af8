"""mPLUG-Owl2: one decoder, two ways."""
