"""Frozen data that every stage reads and writes; nothing here imports torch."""
