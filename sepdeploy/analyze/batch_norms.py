"""Batch norms of any class: PyTorch's own, frozen ones, and those that hold an activation.

timm's networks have the activation inside of a subclass of the batch norm, detection networks have norms of their own
whose statistics are frozen. What such a module computes is tried, so that no class has to be known.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

__all__ = ["NormParts", "behind_norm", "has_hooks", "is_batchnorm", "is_overridden", "is_plain_batchnorm", "norm_parts"]

_STATE = frozenset({"weight", "bias", "running_mean", "running_var", "num_batches_tracked"})

_TOLERANCE = 1e-6
"""Of a channel's largest output, in float64: what a norm with another eps differs by is more, or is nothing."""


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
        isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)
        and module.running_mean is not None
        and not module.training
        and not any(is_overridden(module, nn.BatchNorm2d, method) for method in ("__call__", "forward"))
        and not has_hooks(module)
        and not nn.utils.parametrize.is_parametrized(module)
    )


def is_batchnorm(module: nn.Module | None) -> bool:
    """Whether the module is a batch norm in eval mode, with nothing behind it but its children, in their order.

    Plain ones are. Any other that has the statistics of one is run on random values, of both signs in every channel,
    with the weights that it has: of other weights nothing is claimed.
    """
    if is_plain_batchnorm(module):
        return True
    if module is None or module.training or has_hooks(module) or nn.utils.parametrize.is_parametrized(module):
        return False
    try:
        return norm_parts(module) is not None and _computes_batchnorm(module)
    except Exception:  # whatever a user's module does on being copied or run alone
        return False


@torch.no_grad()
def _computes_batchnorm(module: nn.Module) -> bool:
    whole = copy.deepcopy(module).cpu().double()
    behind = copy.deepcopy(behind_norm(module)).cpu().double()
    parts = norm_parts(whole)
    if parts is None:
        return False
    values = torch.randn(2, len(parts.mean), 7, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = values * 3 * parts.variance.sqrt()[:, None, None] + parts.mean[:, None, None]
    found = whole(x.clone())
    expected = behind(F.batch_norm(x, *parts.tensors, False, 0.0, parts.eps))
    if found.shape != expected.shape:
        return False
    errors, largest = (values.abs().amax((0, 2, 3)) for values in (found - expected, expected))
    return bool((errors <= _TOLERANCE * largest).all())


def norm_parts(module: nn.Module) -> NormParts | None:
    """Statistics, weights and eps of a batch norm of any class; None if the module has others, or none."""
    own = {**module._parameters, **module._buffers}
    mean, variance, weight, bias = (own.get(name) for name in ("running_mean", "running_var", "weight", "bias"))
    eps = getattr(module, "eps", None)
    if mean is None or variance is None or not own.keys() <= _STATE or not isinstance(eps, float | int):
        return None
    return NormParts(mean, variance, weight, bias, eps)


def behind_norm(norm: nn.Module) -> nn.Module:
    """The children of a batch norm, under their names; an identity if it has none."""
    children = OrderedDict(norm.named_children())
    return nn.Sequential(children) if children else nn.Identity()


def is_overridden(module: nn.Module, base: type[nn.Module], method: str) -> bool:
    """Whether a subclass of `base`, or the object itself, brings its own `method`."""
    return method in vars(module) or getattr(type(module), method) is not getattr(base, method)


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody else's code runs with the module."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )
