"""Batch norms of any class: PyTorch's own, frozen ones, and those that hold an activation.

timm's networks have the activation inside of a subclass of the batch norm, detection networks have norms of their own
whose statistics are frozen. What such a module computes is tried, so that no class has to be known.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from dataclasses import dataclass
from typing import TypeGuard

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

__all__ = ["NormParts", "behind_norm", "has_hooks", "is_batchnorm", "is_overridden", "is_plain_batchnorm", "norm_parts"]

_STATE = frozenset({"weight", "bias", "running_mean", "running_var", "num_batches_tracked"})

_TOLERANCE = 1e-6
"""Of a channel's largest output, in float64: with a variance of 2 another eps differs by more."""

_REACHES = (3, 300)
"""Standard deviations of the values: a clamp shows only where something is beyond it."""


@dataclass(frozen=True, slots=True)
class NormParts:
    """What a batch norm computes with in eval mode.

    Attributes:
        mean: (C,), as the others.
        variance: Before eps is added.
        weight: None where there is none.
        bias: None where there is none.
        eps: Added to the variance.
    """

    mean: Tensor
    variance: Tensor
    weight: Tensor | None
    bias: Tensor | None
    eps: float

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """In the order of `torch.nn.functional.batch_norm`."""
        return self.mean, self.variance, self.weight, self.bias


def is_plain_batchnorm(module: nn.Module | None) -> bool:
    """Whether the module does nothing but scale and shift, by its class: some subclasses have an activation inside."""
    return (
        _is_plain_class(module)
        and module.running_mean is not None
        and not module.training
        and not has_hooks(module)
        and not nn.utils.parametrize.is_parametrized(module)
    )


def _is_plain_class(module: nn.Module | None) -> TypeGuard[nn.BatchNorm1d | nn.BatchNorm2d]:
    return isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and not any(
        is_overridden(module, nn.BatchNorm2d, method) for method in ("__call__", "forward")
    )


def is_batchnorm(module: nn.Module | None) -> bool:
    """Whether the module is a batch norm in eval mode, with nothing behind it but its children, in their order.

    Plain ones are. A copy of any other that has the state of one is run on random values, with the weights that it has
    and with random ones, for weights may change later. What Python code it runs sees these values too.
    """
    if is_plain_batchnorm(module):
        return True
    if module is None or module.training or has_hooks(module) or isinstance(module, torch.jit.ScriptModule):
        return False
    state = module._parameters.keys() | module._buffers.keys()
    if not {"running_mean", "running_var"} <= state <= _STATE or nn.utils.parametrize.is_parametrized(module):
        return False
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            return _computes_batchnorm(module, draws=False) and _computes_batchnorm(module, draws=True)
    except Exception:  # whatever a user's module does on being copied or run alone
        return False


def _computes_batchnorm(module: nn.Module, *, draws: bool) -> bool:
    whole = copy.deepcopy(module).cpu().double()
    parts = norm_parts(whole)
    if parts is None:
        return False
    torch.manual_seed(0)
    if draws:
        parts.variance.copy_(10 ** parts.variance.uniform_(-6, 1))
        for tensor in (parts.mean, parts.weight, parts.bias):
            if tensor is not None:
                tensor.uniform_(-1, 1)
    behind = copy.deepcopy(behind_norm(module)).cpu().double()
    for reach in _REACHES:
        x = torch.randn(2, len(parts.mean), 7, 7, dtype=torch.float64) * reach
        x = x * (parts.variance + parts.eps).sqrt()[:, None, None] + parts.mean[:, None, None]
        expected = behind(F.batch_norm(x, *parts.tensors, False, 0.0, parts.eps))
        found = whole(x)
        if found.shape != expected.shape:
            return False
        errors, largest = (each.abs().amax((0, 2, 3)) for each in (found - expected, expected))
        if not bool((errors <= _TOLERANCE * largest).all()):
            return False
    return True


def norm_parts(module: nn.Module) -> NormParts | None:
    """Statistics, weights and eps of a batch norm of any class; None if the module has no statistics."""
    mean, variance, weight, bias = (
        getattr(module, name, None) for name in ("running_mean", "running_var", "weight", "bias")
    )
    if mean is None or variance is None:
        return None
    return NormParts(mean, variance, weight, bias, float(getattr(module, "eps")))  # noqa: B009 - of any class


def behind_norm(norm: nn.Module) -> nn.Module:
    """What a norm does besides: its children, under their names; an identity if it has none or is a plain one.

    Children that a plain norm does not run are still there for those who do.
    """
    children = OrderedDict(norm.named_children())
    behind = nn.Sequential(children) if children and not _is_plain_class(norm) else nn.Identity()
    for name, child in children.items():
        behind.add_module(name, child)
    behind.training = norm.training
    return behind


def is_overridden(module: nn.Module, base: type[nn.Module], method: str) -> bool:
    """Whether a subclass of `base`, or the object itself, brings its own `method`."""
    return method in vars(module) or getattr(type(module), method) is not getattr(base, method)


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody else's code runs with the module."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )
