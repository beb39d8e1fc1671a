"""Files that are built and run outside of this Python: one folder per image."""
