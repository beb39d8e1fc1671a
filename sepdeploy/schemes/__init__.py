"""Separable schemes, one per file, and the module that runs any of them."""
