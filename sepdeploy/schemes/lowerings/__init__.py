"""Lowerings: the same function, written down in another way; one per file, or a pair of inverses."""
