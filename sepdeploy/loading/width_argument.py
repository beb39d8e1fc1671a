"""An architecture at other widths: the argument of its factory that scales the channels."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from sepdeploy.errors import UsageError
from sepdeploy.loading.arch import find_factory, imported_place, split_spec

__all__ = ["WIDTH_NAMES", "ScaledArchitecture", "scaled_architecture"]

WIDTH_NAMES = ("width", "width_mult", "channel_multiplier", "multiplier")
"""Arguments that are taken for a factor on the channels, the first that the factory has."""


@dataclass(frozen=True, slots=True)
class ScaledArchitecture:
    """An architecture whose channels can be scaled.

    Attributes:
        spec: As the user gave it: multiplier 1.
        place: What stands before the factory: a module, a file, 'timm'.
        factory: Name of the factory.
        arguments: Its arguments as given.
        width_name: The argument that scales the channels; None if it has none.
        width: That argument at multiplier 1.
    """

    spec: str
    place: str
    factory: str
    arguments: dict[str, Any]
    width_name: str | None
    width: float = 1.0

    def at(self, multiplier: float) -> str:
        """The spec with `multiplier` times as many channels.

        Raises:
            UsageError: if the factory cannot scale them.
        """
        if multiplier == 1:
            return self.spec
        if self.width_name is None:
            raise UsageError(
                f"{self.spec} has no argument that scales its channels ({', '.join(WIDTH_NAMES)}): add one such as "
                "width: float = 1.0 to the factory, name yours with --width-argument, or give --multiplier 1"
            )
        arguments = {**self.arguments, self.width_name: _scaled(self.width, multiplier)}
        printed = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
        return f"{self.place}:{self.factory}({printed})"


def scaled_architecture(spec: str, width_name: str | None = None) -> ScaledArchitecture:
    """Find the argument of an architecture's factory that scales its channels.

    Args:
        spec: As for `build_architecture`, which has accepted it.
        width_name: The argument; None looks for one of `WIDTH_NAMES`.

    Raises:
        UsageError: if the factory has no argument `width_name`.

    >>> scaled_architecture("models.resnet_cifar:resnet20(num_classes=100)").at(3.625)
    'models.resnet_cifar:resnet20(num_classes=100, width=3.625)'
    """
    place, factory, arguments = split_spec(spec)
    parameters = _parameters(spec, place, factory)
    if width_name is None:
        width_name = next((name for name in WIDTH_NAMES if name in parameters), None)
    elif parameters and width_name not in parameters and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        raise UsageError(f"{spec} has no argument '{width_name}'; it takes {', '.join(parameters)}")
    if width_name is None:
        return ScaledArchitecture(spec, place, factory, arguments, None)
    default = parameters[width_name].default if width_name in parameters else None
    width = arguments.get(width_name, default)
    if not isinstance(width, int | float) or isinstance(width, bool):
        width = 1.0  # no default that is a number: the argument is taken for a factor
    return ScaledArchitecture(spec, place, factory, arguments, width_name, width)


def _parameters(spec: str, place: str, factory: str) -> dict[str, inspect.Parameter]:
    """What the factory takes; nothing where it does not tell."""
    if place == "timm":
        return {}
    with imported_place(spec, place) as (module, _):
        found = find_factory(module, factory, place)
    try:
        return dict(inspect.signature(found).parameters) if callable(found) else {}
    except (TypeError, ValueError):
        return {}


def _scaled(width: float, multiplier: float) -> float:
    """Whole numbers of channels stay whole; a factor of 1 may become any other."""
    scaled = round(width * multiplier, 9)
    is_count = isinstance(width, int) and (width > 1 or scaled == round(scaled))
    return max(1, round(scaled)) if is_count else scaled
