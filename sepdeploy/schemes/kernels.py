"""Kernels of chains: group by group, and multiplied out to the dense kernel that they compute."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F  # noqa: N812 (PyTorch's own convention)
from torch import Tensor

from sepdeploy.core.chain import Chain, ChainSum, Factor, Shuffle, Slice, Stage, Towers
from sepdeploy.errors import UsageError
from sepdeploy.schemes.scheme import FactorWeights

__all__ = [
    "compose_chain",
    "compose_kernels",
    "dense_kernel",
    "input_channels",
    "join_groups",
    "kernel_error",
    "split_groups",
]


def split_groups(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """Rows (C, ...) as one batch of groups (G, max(sizes), ...); smaller groups end in zeros."""
    if min(sizes) == max(sizes):
        return x.reshape(len(sizes), sizes[0], *x.shape[1:])
    with_zero = torch.cat([x, x.new_zeros(1, *x.shape[1:])])
    return with_zero[_places(sizes)]


def join_groups(x: Tensor, sizes: Sequence[int]) -> Tensor:
    """The inverse of `split_groups`."""
    if min(sizes) == max(sizes):
        return x.flatten(0, 1)
    places = _places(sizes).flatten()
    return x.flatten(0, 1)[places < sum(sizes)]


def _places(sizes: Sequence[int]) -> Tensor:
    """(G, max(sizes)): the row that each place of a group takes, the row after the last where it has none."""
    counts = torch.tensor(sizes)
    column = torch.arange(int(counts.max()))
    starts = counts.cumsum(0) - counts
    return torch.where(column < counts[:, None], starts[:, None] + column, int(counts.sum()))


def input_channels(factor: Factor) -> Tensor:
    """The input channel that each column of a factor's weight reads, (O, in_per_group).

    `factor.in_channels`, one past the last, where a smaller group has no such column.

    >>> input_channels(Factor(5, 2, (1, 1), groups=2)).tolist()
    [[0, 1, 2], [3, 4, 5]]
    """
    sizes = torch.tensor(factor.in_groups)
    starts = sizes.cumsum(0) - sizes
    places = torch.arange(factor.in_per_group)
    channels = torch.where(places < sizes[:, None], starts[:, None] + places, factor.in_channels)
    return channels.repeat_interleave(torch.tensor(factor.out_groups), 0)


def dense_kernel(weight: Tensor, factor: Factor) -> Tensor:
    """A grouped kernel (O, in_per_group, Kh, Kw) as the dense one (O, I, Kh, Kw) with zeros between the groups."""
    if factor.groups == 1:
        return weight
    # Columns behind the end of a smaller group go to one of their own, which is cut off.
    dense = weight.new_zeros(factor.out_channels, factor.in_channels + 1, *factor.kernel_size)
    rows = torch.arange(factor.out_channels)[:, None]
    return dense.index_put((rows, input_channels(factor)), weight)[:, : factor.in_channels]


def compose_kernels(weights: FactorWeights, form: ChainSum, groups: int = 1) -> Tensor:
    """The dense kernel that a sum of chains computes.

    Two correlations in a row are the correlation with the full convolution of their kernels. Along each axis only the
    last factor with taps may stride and all factors with taps must share their dilation, which is then that of the
    dense kernel too.

    Args:
        weights: Per term and factor, (O, in_per_group, Kh, Kw) each.
        form: The chains that the weights belong to.
        groups: Groups of the dense kernel; every chain must respect them.

    Returns:
        (O, I / groups, Kh, Kw).

    Raises:
        UsageError: if a chain has a norm or an activation.
    """
    total: Tensor | None = None
    for values, chain in zip(weights, form.terms, strict=True):
        kernel = compose_chain(values, chain)
        total = kernel if total is None else total + kernel
    if total is None:
        raise UsageError("a sum of no chains has no kernel")
    if groups == 1:
        return total
    out_channels, in_channels = total.shape[:2]
    blocks = total.reshape(groups, out_channels // groups, groups, in_channels // groups, *total.shape[2:])
    index = torch.arange(groups)
    return blocks[index, :, index].reshape(out_channels, in_channels // groups, *total.shape[2:])


def compose_chain(weights: Sequence[Tensor], chain: Chain) -> Tensor:
    """The dense kernel (O, I, Kh, Kw) of one chain; `weights` in the order of `chain.factors`."""
    if not weights:
        raise UsageError("a chain without weights has no kernel")
    queue = iter(weights)
    eye = torch.eye(chain.in_channels, dtype=weights[0].dtype)[:, :, None, None]
    return _composed(chain.stages, queue, eye, is_identity=True)


def _composed(stages: Sequence[Stage], weights: Iterator[Tensor], kernel: Tensor, *, is_identity: bool) -> Tensor:
    """The kernel (C, I, Kh, Kw) after more stages."""
    for stage in stages:
        if isinstance(stage, Factor):
            weight = next(weights)
            kernel = dense_kernel(weight, stage) if is_identity else _times(weight, stage, kernel)
        elif isinstance(stage, Shuffle):
            kernel = kernel[list(stage.order(len(kernel)))]
        elif isinstance(stage, Slice):
            kernel = kernel[stage.start : stage.stop]
        elif isinstance(stage, Towers):
            parts = [_composed(branch.stages, weights, kernel, is_identity=is_identity) for branch in stage.branches]
            kernel = torch.cat(parts) if stage.join == "concat" else torch.stack(parts).sum(0)
        else:
            raise UsageError(f"a chain with a {stage.kind} computes no convolution; fold or remove it first")
        is_identity = False
    return kernel


def kernel_error(weight: Tensor, weights: FactorWeights, form: ChainSum) -> float:
    """Relative Frobenius error |W' - W| / |W| of what a form computes, for a kernel W (O, I / groups, Kh, Kw)."""
    error = compose_kernels(weights, form, form.in_channels // weight.shape[1]).double() - weight.double()
    return float(error.norm() / weight.double().norm().clamp_min(1e-30))


def _times(weight: Tensor, factor: Factor, kernel: Tensor) -> Tensor:
    """The kernel (O, I, ...) of `factor` applied after a kernel (C, I, ...)."""
    first = split_groups(kernel, factor.in_groups)  # (G, n, I, a, b)
    second = split_groups(weight, factor.out_groups)  # (G, m, n, kh, kw)
    groups, size, in_channels, *extent = first.shape
    outputs, taps = second.shape[1], factor.kernel_size
    if all(1 in pair for pair in zip(extent, taps, strict=True)):
        # Along each axis only one of the two has taps: a matrix product per group, all in one batch.
        left = second.permute(0, 1, 3, 4, 2).reshape(groups, -1, size)
        product = (left @ first.reshape(groups, size, -1)).reshape(groups, outputs, *taps, in_channels, *extent)
        composed = product.permute(0, 1, 4, 2, 5, 3, 6).reshape(
            groups, outputs, in_channels, taps[0] * extent[0], taps[1] * extent[1]
        )
    else:
        images = first.permute(2, 0, 1, 3, 4).flatten(1, 2)
        full = F.conv2d(
            images, second.flatten(0, 1).flip(2, 3), padding=(taps[0] - 1, taps[1] - 1), groups=groups
        )  # (I, G * m, ...)
        composed = full.transpose(0, 1).reshape(groups, outputs, in_channels, *full.shape[2:])
    return join_groups(composed, factor.out_groups)
