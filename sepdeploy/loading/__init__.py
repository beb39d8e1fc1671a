"""Model files and architectures to trained networks, without running code that a model file carries."""
