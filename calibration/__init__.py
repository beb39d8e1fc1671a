"""Manifests that say how the images of a calibration set are found, split and preprocessed."""
