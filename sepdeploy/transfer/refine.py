"""Refine all factors of a form together, on sums alone: no further pass over the images.

The form computes a convolution whose kernel W' is a polynomial in its factors, so its squared error against the target,
    sum |y - W' p|^2 = sum y^2 - 2 <W', sum y p^T> + <W', W' sum p p^T>,
needs only the second moments of the window patches p and their products with the targets. L-BFGS on this function
refines what the closed form and the last factors' exact solve began; it stops where held-out positions stop gaining.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sepdeploy.core.chain import ChainSum
from sepdeploy.schemes.kernels import compose_kernels
from sepdeploy.schemes.module import ChainConv2d
from sepdeploy.transfer.moments import LeastSquaresSums

__all__ = ["MAX_WINDOW_FEATURES", "refine_factors"]

MAX_WINDOW_FEATURES = 2400
"""Widest window, I / groups * Kh * Kw, whose n x n moments are worth their time: 256 channels at 3x3."""

_ITERATIONS_PER_ROUND = 20
_MAX_ROUNDS = 3
_MIN_GAIN = 2e-3  # of the held-out error, per round


def refine_factors(module: ChainConv2d, fit: LeastSquaresSums, held_out: LeastSquaresSums) -> float:
    """Improve the weights and the bias of `module` in place.

    Args:
        module: Starts from its present weights; has a bias.
        fit: Sums over window patches (as the dense kernel sees them) and targets to descend on.
        held_out: The same over other images: decides how far to descend; may be empty.

    Returns:
        Relative error |y - y'| / |y| over both sets, afterwards.
    """
    start = _parameters_of(module)
    total = fit + held_out
    error = _error(start, module, total)
    parameters = _descend_while_useful(start, module, fit, held_out) if held_out.positions else start
    if parameters is not start or not held_out.positions:
        # A last round on all positions takes what the held-out ones add.
        refined = _descend(parameters, module, total)
        refined_error = _error(refined, module, total)
        if refined_error < error:
            error = refined_error
            factors, bias = _split(refined, module.form)
            module.set_weights(factors, bias)
    return math.sqrt(error)


def _descend_while_useful(
    start: list[Tensor], module: ChainConv2d, fit: LeastSquaresSums, held_out: LeastSquaresSums
) -> list[Tensor]:
    """Rounds on `fit` as long as each improves `held_out`; returns the best parameters, maybe `start` itself."""
    best, best_error = start, _error(start, module, held_out)
    for _ in range(_MAX_ROUNDS):
        parameters = _descend(best, module, fit)
        error = _error(parameters, module, held_out)
        if not error < best_error * (1 - _MIN_GAIN):
            break
        best, best_error = parameters, error
    return best


def _descend(start: list[Tensor], module: ChainConv2d, sums: LeastSquaresSums) -> list[Tensor]:
    """One round of L-BFGS from `start`; returns new parameters."""
    parameters = [value.clone().requires_grad_() for value in start]
    optimizer = torch.optim.LBFGS(
        parameters,
        max_iter=_ITERATIONS_PER_ROUND,
        history_size=_ITERATIONS_PER_ROUND,
        tolerance_grad=0,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        with torch.enable_grad():
            solution = _solution(parameters, module)
        # The gradient of a quadratic form, by hand: a graph through it would multiply by the Gram matrix twice.
        values = solution.detach()
        fitted = sums.gram @ values
        solution.backward(2 * (fitted - sums.cross) / _energy(sums))  # type: ignore[no-untyped-call]
        return ((values * fitted).sum() - 2 * (values * sums.cross).sum()) / _energy(sums)

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return [value.detach() for value in parameters]


def _solution(parameters: list[Tensor], module: ChainConv2d) -> Tensor:
    """The equivalent kernel and the bias as `LeastSquaresSums` have them, (G, n + 1, O / G)."""
    factors, bias = _split(parameters, module.form)
    kernel = compose_kernels(factors, module.form, module.groups)
    columns = kernel.reshape(module.groups, module.out_channels // module.groups, -1)
    return torch.cat([columns, bias.reshape(module.groups, -1, 1)], dim=2).mT


@torch.no_grad()
def _error(parameters: list[Tensor], module: ChainConv2d, sums: LeastSquaresSums) -> float:
    """Squared error relative to the energy of the targets."""
    return sums.squared_error(_solution(parameters, module)) / _energy(sums)


def _energy(sums: LeastSquaresSums) -> float:
    return max(sums.target_energy, torch.finfo(torch.float64).tiny)


def _parameters_of(module: ChainConv2d) -> list[Tensor]:
    """All factor weights, term by term, and the bias last, as float64 copies."""
    weights = [weight.detach().double() for term in module.factor_weights() for weight in term]
    bias = module.bias
    return [*weights, torch.zeros(module.out_channels).double() if bias is None else bias.detach().double()]


def _split(parameters: list[Tensor], form: ChainSum) -> tuple[tuple[tuple[Tensor, ...], ...], Tensor]:
    """The inverse of `_parameters_of`: weights per term and factor, and the bias."""
    weights = iter(parameters[:-1])
    return tuple(tuple(next(weights) for _ in chain.factors) for chain in form.terms), parameters[-1]
