"""The version, in one place."""

__version__ = "0.1.0"

RULES = 3
"""Raised with every change after which what an earlier commit left in a bundle or a cache is no longer right."""
