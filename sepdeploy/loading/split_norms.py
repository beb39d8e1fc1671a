"""Take batch norms that do more apart: the norm as PyTorch's own module, and what follows it.

timm's networks hold the activation inside of a subclass of the batch norm, detection networks have norms of their own
whose statistics are frozen. Everything that looks for a norm (folding, int8, anchors) or for an activation sees them
only once they are modules by themselves.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Collection

import torch
from torch import Tensor, nn

__all__ = ["NORM", "compound_norms", "split_norms"]

NORM = "norm"
"""Name of the norm inside of the pair."""

_STATE = frozenset({"weight", "bias", "running_mean", "running_var", "num_batches_tracked"})
_TOLERANCE = 1e-5


class _FrozenNorm(nn.BatchNorm2d):
    """Uses its statistics in training too."""

    def train(self, mode: bool = True) -> _FrozenNorm:  # noqa: ARG002 - nothing is different in training
        super().train(False)
        return self


def compound_norms(network: nn.Module) -> tuple[str, ...]:
    """Names of the modules that are a batch norm followed by their children, and nothing else."""
    return tuple(name for name, module in network.named_modules() if name and _is_compound(module))


def split_norms(network: nn.Module, names: Collection[str]) -> nn.Module:
    """A copy with the norm, as `norm`, and its children in their order in the place of each module.

    The outputs stay the same, in inference and in training.

    Args:
        network: The network; it is not changed, and returned as it is if there is nothing to split.
        names: Of modules as `compound_norms` gives them.
    """
    if not names:
        return network
    network = copy.deepcopy(network)
    parts = {id(module): _parts(module) for module in map(network.get_submodule, names)}
    modules = dict(network.named_modules(remove_duplicate=False))
    for name, module in modules.items():
        if id(module) in parts:
            parent, _, attribute = name.rpartition(".")
            setattr(modules[parent], attribute, parts[id(module)])
    return network


@torch.no_grad()
def _is_compound(module: nn.Module) -> bool:
    """Whether the parts compute what the module does, with any weights; no class has to be known for that."""
    if type(module).__module__.startswith("torch.") or not _has_state_of_norm(module):
        return False
    try:
        whole = copy.deepcopy(module).cpu().float()
        parts = copy.deepcopy(_parts(module)).cpu().float()
        source = torch.Generator().manual_seed(0)
        own = _own_state(whole)
        (channels,) = own["running_mean"].shape
        drawn = {name: torch.rand(channels, generator=source) + 0.5 for name in sorted(own) if own[name].dim() == 1}
        for each in (whole, parts.get_submodule(NORM)):
            each.load_state_dict(drawn, strict=False)
        x = 3 * torch.randn(2, channels, 5, 5, generator=source)
        return all(_agree(whole.train(mode), parts.train(mode), x) for mode in (False, True))
    except Exception:  # whatever a user's module does on being copied or run alone
        return False


def _agree(whole: nn.Module, parts: nn.Module, x: Tensor) -> bool:
    """Whether outputs and statistics are the same afterwards."""
    outputs = []
    for module in (whole, parts):
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)  # for dropout among the children
            outputs.append(module(x.clone()))
    states = [_own_state(module) for module in (whole, parts.get_submodule(NORM))]
    pairs = [outputs, *([state[name] for state in states] for name in ("running_mean", "running_var"))]
    return all(torch.allclose(a, b, rtol=_TOLERANCE, atol=_TOLERANCE) for a, b in pairs)


def _own_state(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers of the module itself."""
    return {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}


def _has_state_of_norm(module: nn.Module) -> bool:
    own = _own_state(module)
    return (
        {"running_mean", "running_var"} <= own.keys() <= _STATE
        and ("weight" in own) == ("bias" in own)
        and NORM not in dict(module.named_children())
        and not (module._forward_hooks or module._forward_pre_hooks)
        and not nn.utils.parametrize.is_parametrized(module)
    )


def _parts(module: nn.Module) -> nn.Sequential:
    own = _own_state(module)
    kind = nn.BatchNorm2d if isinstance(module, nn.BatchNorm2d) else _FrozenNorm
    norm = kind(
        len(own["running_mean"]),
        eps=getattr(module, "eps", 1e-5),
        momentum=getattr(module, "momentum", 0.1),
        affine="weight" in own,
    )
    for name, value in own.items():
        if name in norm._buffers:
            norm._buffers[name] = value
        else:
            norm.register_parameter(
                name, value if isinstance(value, nn.Parameter) else nn.Parameter(value, requires_grad=False)
            )
    parts = nn.Sequential(OrderedDict([(NORM, norm), *module.named_children()]))
    return parts.train(module.training)
