"""Put other modules in the place of convolutions."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from sepdeploy.errors import UsageError

__all__ = ["replace_modules"]


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
