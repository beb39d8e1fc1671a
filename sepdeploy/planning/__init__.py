"""Which convolutions to replace, and the guard that holds the accuracy."""
