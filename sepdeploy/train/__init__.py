"""Gradient training: block reconstruction and fine-tuning."""
