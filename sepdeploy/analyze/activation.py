"""Which activation follows each convolution: what a runtime computes as one block with it.

One real run is observed below autograd, as in `trace.py`: whether a network calls modules or functions, in place or
not, the operators are the same.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sepdeploy.analyze.batch_norms import behind_norm
from sepdeploy.analyze.recorder import run_once, watching_modules
from sepdeploy.core.conv import Trace
from sepdeploy.core.selection import Activation

__all__ = ["find_activations"]

_OPERATORS: Mapping[str, Activation] = MappingProxyType(
    {
        "relu": "relu",
        "hardswish": "hardswish",
        "silu": "silu",
        "sigmoid": "sigmoid",
        "hardsigmoid": "hardsigmoid",
        "leaky_relu": "leaky_relu",
        "gelu": "gelu",
    }
)

_CLAMPS: Mapping[tuple[float | None, float | None], Activation] = MappingProxyType({(0, None): "relu", (0, 6): "relu6"})
"""Limits of a clamp -> the activation that it is."""


@torch.no_grad()
def find_activations(model: nn.Module, example: Tensor, trace: Trace) -> dict[str, Activation]:
    """The activation that follows each convolution, behind its batch norm if it has one, and alone reads its output.

    Args:
        model: The network, in eval mode.
        example: One image as the network takes it, (1, C, H, W) or (1, H, W, C), float32.
        trace: Its trace.

    Returns:
        Name of each site -> the activation; empty if there is none, it is not a known one, something else reads the
        output too, or calls of the same convolution differ.

    Raises:
        UsageError: if the network does not run on an input of this shape.
    """
    ends = {site.norm or site.name: site.name for site in trace.sites if site.spec is not None and site.calls}
    modules = {site: model.get_submodule(end) for end, site in ends.items()}
    norms = (model.get_submodule(site.norm) for site in trace.sites if site.norm is not None)
    holding = {id(norm) for norm in norms if not isinstance(behind_norm(norm), nn.Identity)}
    watch = _Watch({id(module): site for site, module in modules.items()}, holding)
    with watching_modules(watch.enter, watch.leave), watch:
        returned = run_once(model, example.clone())  # a copy: networks may normalize their input in place
    for leaf in tree_leaves(returned):
        if isinstance(leaf, Tensor):
            watch.read(leaf, "")
    return {site.name: watch.activation_of(site.name) for site in trace.sites}


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records who reads the outputs of some modules; of norms that hold more, what they compute before that.

    Args:
        names: Name of the site whose output each module returns, by the module's id.
        holding: Ids of those norms.
    """

    def __init__(self, names: Mapping[int, str], holding: Collection[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._names, self._holding = names, holding
        self._readers: dict[str, list[list[Activation]]] = {}  # per call of a site
        self._outputs: dict[int, tuple[Tensor, list[Activation]]] = {}  # holds the tensors, so that ids stay unique
        self._inside = ""  # the site whose norm runs, until one of its children does

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        activation = _activation(func, args, kwargs or {})
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                self.read(leaf, activation)
        if func._schema.is_mutable and args and isinstance(args[0], Tensor):
            self._outputs.pop(id(args[0]), None)  # from here on the tensor holds something else
        if self._inside:
            for leaf in tree_leaves(result)[:1]:
                self._follow(leaf, self._readers[self._inside][-1])
        return result

    def enter(self, module: nn.Module) -> None:
        """A module begins."""
        self._inside = self._names[id(module)] if id(module) in self._holding else ""
        if self._inside:
            self._readers.setdefault(self._inside, []).append([])

    def leave(self, module: nn.Module, output: object) -> None:
        """A module has returned `output`."""
        self._inside = ""
        if id(module) in self._names and isinstance(output, Tensor) and id(module) not in self._holding:
            self._readers.setdefault(self._names[id(module)], []).append([])
            self._follow(output, self._readers[self._names[id(module)]][-1])

    def _follow(self, output: Tensor, readers: list[Activation]) -> None:
        """From now on record in `readers`, and nothing of before, who reads `output`."""
        readers.clear()
        self._outputs = {key: pair for key, pair in self._outputs.items() if pair[1] is not readers}
        self._outputs[id(output)] = (output, readers)

    def read(self, tensor: Tensor, activation: Activation) -> None:
        """Something reads `tensor`: an activation, or empty for anything else."""
        if id(tensor) in self._outputs:
            self._outputs[id(tensor)][1].append(activation)

    def activation_of(self, site: str) -> Activation:
        """What alone reads every output of a site; empty if nothing does."""
        calls = self._readers.get(site, [])
        found = {tuple(readers) for readers in calls}
        return calls[0][0] if len(found) == 1 and len(calls[0]) == 1 else ""


def _activation(func: Any, args: Any, kwargs: Any) -> Activation:
    """The activation that an operator computes, in place or not; empty for all others."""
    name = func._overloadpacket.__name__.rstrip("_")
    if name in ("hardtanh", "clamp", "clamp_min"):
        given = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)}
        given = {argument.name: argument.default_value for argument in func._schema.arguments} | given | kwargs
        low, high = (given.get("min_val", given.get("min")), given.get("max_val", given.get("max")))
        limits = (low, high)
        return _CLAMPS.get(limits, "") if not any(isinstance(limit, Tensor) for limit in limits) else ""
    return _OPERATORS.get(name, "")
