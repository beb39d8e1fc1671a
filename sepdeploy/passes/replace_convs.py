"""Put other modules in the place of convolutions."""

from __future__ import annotations

import copy
from collections.abc import Mapping

from torch import nn

from sepdeploy.core.quiet import error_summary
from sepdeploy.errors import UnsupportedModelError, UsageError

__all__ = ["copy_network", "replace_modules"]


def copy_network(model: nn.Module) -> nn.Module:
    """A deep copy, to be rewritten while the original stays as it is.

    Raises:
        UnsupportedModelError: if the network holds something that cannot be copied.
    """
    try:
        return copy.deepcopy(model)
    except Exception as error:  # user objects raise whatever they like on being copied
        raise UnsupportedModelError(f"the network cannot be copied: {error_summary(error)}") from error


def replace_modules(model: nn.Module, replacements: Mapping[str, nn.Module]) -> tuple[str, ...]:
    """Replace modules by name, in place, wherever the same object is registered.

    Args:
        model: The network.
        replacements: Qualified name -> the module that takes its place.

    Returns:
        The qualified names that now hold a replacement, aliases included.

    Raises:
        UsageError: if the network has no module of that name, or the network itself is named.
    """
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    modules = dict(model.named_modules(remove_duplicate=False))
    changed = []
    for name, replacement in replacements.items():
        if not name or name not in modules:
            raise UsageError(f"the network has no replaceable module '{name}'")
        for alias in names[id(modules[name])]:
            parent, _, attribute = alias.rpartition(".")
            setattr(modules[parent], attribute, replacement)
            changed.append(alias)
    return tuple(changed)
