"""The last factors of a form as one linear layer: what they read, their weights as matrices, and their ridge solve."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sepdeploy.errors import ContractError
from sepdeploy.schemes.kernels import join_groups, split_groups
from sepdeploy.schemes.module import ChainConv2d
from sepdeploy.transfer.moments import LeastSquaresSums, patches

__all__ = [
    "best_solution",
    "grouped_outputs",
    "last_factor_columns",
    "last_factors_as_matrix",
    "set_last_factors",
]

_RIDGES = (1e-6, 1e-4, 1e-3, 1e-2, 1e-1)


def best_solution(fit: LeastSquaresSums, held_out: LeastSquaresSums, total: LeastSquaresSums, prior: Tensor) -> Tensor:
    """The solution with the ridge that does best on held-out positions; the prior itself if none beats it."""
    if held_out.positions == 0:
        return total.solve(prior, _RIDGES[-1])
    errors = {ridge: held_out.squared_error(fit.solve(prior, ridge)) for ridge in _RIDGES}
    best = min(errors, key=lambda ridge: errors[ridge])
    if errors[best] >= held_out.squared_error(prior):
        return prior
    return total.solve(prior, best)


def last_factor_columns(module: ChainConv2d, x: Tensor) -> Tensor:
    """What the last factors of all terms read for each output position, (G, n, P), stacked term by term."""
    x = module.pad(x)
    columns = []
    for term, chain in zip(module.terms, module.form.terms, strict=True):
        stages = list(term.children())
        # Everything up to the last convolution; its padding (a module of its own if asymmetric) is in `patches`.
        has_padding_module = len(stages) > 1 and isinstance(stages[-2], nn.ZeroPad2d)
        last_input = x
        for stage in stages[: -2 if has_padding_module else -1]:
            last_input = stage(last_input)
        columns.append(patches(last_input, chain.factors[-1]))
    return torch.cat(columns, dim=1)


def last_factors_as_matrix(module: ChainConv2d) -> Tensor:
    """Last factors of all terms and the bias as one (G, n + 1, O / G) float64 matrix per group."""
    sizes = {chain.factors[-1].out_groups for chain in module.form.terms}
    if len(sizes) != 1:
        raise ContractError("the last factors of all terms must have the same groups")
    (out_groups,) = sizes
    rows = [split_groups(term[-1].double().flatten(1), out_groups).mT for term in module.factor_weights()]
    bias = module.bias
    if bias is None:
        raise ContractError("an anchored solve needs a bias")
    return torch.cat([*rows, split_groups(bias.double(), out_groups)[:, None]], dim=1)


def set_last_factors(module: ChainConv2d, solution: Tensor) -> None:
    """The inverse of `last_factors_as_matrix`."""
    out_groups = module.form.terms[0].factors[-1].out_groups
    start = 0
    weights = []
    for term in module.factor_weights():
        rows = term[-1][0].numel()
        last = join_groups(solution[:, start : start + rows].mT, out_groups).reshape(term[-1].shape)
        weights.append((*term[:-1], last))
        start += rows
    module.set_weights(tuple(weights), join_groups(solution[:, -1], out_groups))


def grouped_outputs(y: Tensor, out_groups: tuple[int, ...]) -> Tensor:
    """(N, O, H, W) as (G, largest group, N * H * W), positions ordered as `patches` orders them."""
    return split_groups(y.transpose(0, 1).flatten(1), out_groups)
