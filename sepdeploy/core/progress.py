"""How long work tells how far it is, without knowing who looks."""

from __future__ import annotations

from typing import Protocol

__all__ = ["Progress", "Silent"]


class Progress(Protocol):
    """Receives what is going on."""

    def stage(self, text: str) -> None:
        """A new piece of work begins; `text` says which."""

    def step(self, done: int, total: int) -> None:
        """`done` of `total` parts of it are finished."""


class Silent:
    """Shows nothing."""

    def stage(self, text: str) -> None:
        """Ignore it."""

    def step(self, done: int, total: int) -> None:
        """Ignore it."""
