"""Groups of options that a command takes as one dictionary."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

__all__ = ["collected"]

_T = TypeVar("_T", bound=Callable[..., Any])


def collected(options: Sequence[Callable[[Any], Any]], name: str, fields: Mapping[str, str]) -> Callable[[_T], _T]:
    """Give a command several options, which it takes as one dictionary.

    Args:
        options: Made by `click.option`, in the order of the help.
        name: Of the command's argument.
        fields: Argument of each option -> its key in the dictionary.
    """

    def decorate(command: _T) -> _T:
        @functools.wraps(command)
        def collecting(**arguments: Any) -> Any:
            return command(**{name: {field: arguments.pop(option) for option, field in fields.items()}}, **arguments)

        decorated: Any = collecting
        for option in reversed(options):
            decorated = option(decorated)
        return decorated  # type: ignore[no-any-return]

    return decorate
