"""Rewrites of a network in place; each says what it changed."""
