"""Alternating least squares over the factors of a chain, against a dense kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from sepdeploy.core.chain import Chain
from sepdeploy.schemes.kernels import compose_chain

__all__ = ["alternate_least_squares"]

_MAX_SWEEPS = 30
_MIN_GAIN = 2e-3
"""Sweeps end when one lowers the squared error by less than this share."""

_STEPS = 3
"""Conjugate-gradient steps per factor and sweep; the next sweep goes on where they end."""

_LARGE = 2**20
"""Kernels with more weights are refined in float32: twice as fast, and rounding is far below what a sweep gains."""

_EXACT = 1e-13
"""Relative squared error that counts as none: the square of float64 rounding through a few products."""


@torch.no_grad()
def alternate_least_squares(target: Tensor, chain: Chain, weights: list[Tensor]) -> list[Tensor]:
    """Improve each factor in turn, the others held, until a sweep over all of them no longer helps.

    The kernel of a chain is linear in each factor; each least-squares problem is solved by conjugate gradients, which
    only need the chain's kernel and its derivative.

    Args:
        target: Dense kernel, (O, I, Kh, Kw).
        chain: Factors and shuffles.
        weights: Where to start, (O, in_per_group, Kh, Kw) per factor.

    Returns:
        Weights whose error is at most that of the start.
    """
    dtype = target.dtype
    if target.numel() > _LARGE:
        target, weights = target.float(), [weight.float() for weight in weights]
    weights = list(weights)
    energy = float(target.square().sum())
    residual = target - compose_chain(weights, chain)
    error = float(residual.square().sum())
    if error <= _EXACT * energy:
        return [weight.to(dtype) for weight in weights]
    for _ in range(_MAX_SWEEPS):
        before, last = error, list(weights)
        for index in range(len(weights)):
            step = _least_squares_step(residual, chain, weights, index)
            weights[index] = weights[index] + step
            residual = target - compose_chain(weights, chain)
        error = float(residual.square().sum())
        if error > before:  # rounding: nothing is left to gain
            weights = last
        if error <= _EXACT * energy or error > before * (1 - _MIN_GAIN):
            break
    return [weight.to(dtype) for weight in weights]


def _least_squares_step(residual: Tensor, chain: Chain, weights: list[Tensor], index: int) -> Tensor:
    """Change of one factor that lowers the squared residual most, by a few conjugate-gradient steps."""

    def kernel(values: Tensor) -> Tensor:
        return compose_chain([*weights[:index], values, *weights[index + 1 :]], chain)

    with torch.enable_grad():
        variable = weights[index].detach().requires_grad_()
        output = kernel(variable)

    def adjoint(values: Tensor) -> Tensor:
        (gradient,) = torch.autograd.grad(output, variable, values, retain_graph=True)
        return gradient

    step = torch.zeros_like(weights[index])
    gradient = adjoint(residual)
    direction, size = gradient, float(gradient.square().sum())
    for _ in range(_STEPS):
        change = kernel(direction)
        curvature = float(change.square().sum())
        if curvature <= 0 or size <= 0:
            break
        length = size / curvature
        step = step + length * direction
        residual = residual - length * change
        gradient = adjoint(residual)
        new_size = float(gradient.square().sum())
        direction, size = gradient + (new_size / size) * direction, new_size
    return step
