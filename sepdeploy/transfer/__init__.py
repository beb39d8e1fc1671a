"""Weights for the separable forms, computed from the trained dense kernels without training."""
