"""Closed-form weights of a chain of grouped convolutions: block projection, recursive, then alternating least squares.

In a chain of two, a middle channel joins one group of the first factor to one group of the second. The kernel thus
falls into blocks, (outputs of a group of the second factor) x (inputs of a group of the first), whose ranks are at most
the number of middle channels between the two groups, independent of each other: the best chain is a truncated SVD of
each block (the projection onto Monarch matrices of Dao et al., 2022, here with kernels). Of a longer chain the last
factor is split off like this, with the channels that the other factors can reach; what remains is the kernel of a
shorter chain.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import reduce
from itertools import zip_longest
from operator import or_

import torch
import torch.nn.functional as F  # noqa: N812 (PyTorch's own convention)
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from sepdeploy.core.chain import Chain, Factor, Shuffle, Size, Stage
from sepdeploy.core.receptive_field import receptive_field
from sepdeploy.errors import ContractError
from sepdeploy.schemes.grouped import diagonal_blocks
from sepdeploy.schemes.kernels import join_groups, split_groups
from sepdeploy.schemes.low_rank_svd import factor_matrices
from sepdeploy.schemes.refine_chain import alternate_least_squares

__all__ = ["factorize_chain"]


def factorize_chain(weight: Tensor, chain: Chain, moments: Tensor | None = None) -> tuple[Tensor, ...]:
    """Weights with which a chain comes near to a dense kernel.

    For two factors, of which along each axis only one has taps, the result is the best there is in the Frobenius norm.

    Args:
        weight: (O, I, Kh, Kw).
        chain: Factors and shuffles.
        moments: Second moments of the first factor's patches, (G, n, n): for chains of two factors the error is then
            measured on such inputs, group by group. Longer chains do without.

    Returns:
        (O, in_per_group, Kh, Kw) per factor, in the dtype of `weight`.
    """
    factors = chain.factors
    if len(factors) == 1:
        return (diagonal_blocks(weight, factors[0]),)
    is_optimal = len(factors) == 2 and not _has_shared_axis(factors)
    target = weight.double()
    weights = _split_off_last(target, chain.stages, moments if is_optimal else None)
    if not is_optimal:
        weights = alternate_least_squares(target, chain, weights)
    if moments is None or not is_optimal:
        weights = _with_even_scale(chain, weights)
    return tuple(value.to(weight.dtype).contiguous() for value in weights)


def _has_shared_axis(factors: tuple[Factor, ...]) -> bool:
    """Whether several factors have taps along the same axis: then no closed form is known."""
    return any(sum(factor.kernel_size[axis] > 1 for factor in factors) > 1 for axis in (0, 1))


def _split_off_last(kernel: Tensor, stages: tuple[Stage, ...], moments: Tensor | None) -> list[Tensor]:
    """Weights of all factors for a kernel (O, I, Kh, Kw), float64: the last one by projection, then the others."""
    *before, last = stages
    if not isinstance(last, Factor):
        raise ContractError(f"a chain to be factorized ends in a convolution, not in a {last.kind}")
    if not before:
        return [diagonal_blocks(kernel, last)]
    inner, outer = _project(kernel, tuple(before), last, moments)
    shuffle = before[-1]
    if isinstance(shuffle, Shuffle):
        inner = inner[torch.tensor(shuffle.order(len(inner))).argsort()]
        before.pop()
    return [*_split_off_last(inner, tuple(before), None), diagonal_blocks(outer, last)]


@dataclass(frozen=True, slots=True)
class _Blocks:
    """Blocks of a kernel that do not overlap, as one padded batch; a place that a block lacks holds the index -1.

    Attributes:
        outputs: (B, most outputs): the kernel's output channels.
        inputs: (B, most inputs): its input channels.
        middle: (B, most middle channels): the channels that join them.
        first_groups: (B,): group of the first factor that the first input is in.
    """

    outputs: Tensor
    inputs: Tensor
    middle: Tensor
    first_groups: Tensor


def _project(kernel: Tensor, before: tuple[Stage, ...], last: Factor, moments: Tensor | None) -> tuple[Tensor, Tensor]:
    """Kernels inner (C, I, ...) of the stages before and outer (O, C, ...) of the last factor, zero outside its groups.

    With several rounds the blocks of each are fitted to what the rounds before have left.
    """
    window = _window_of(kernel, last)
    kernel, taps, tap = _without_shared_taps(kernel, window)
    outputs, inputs = kernel.shape[:2]
    inner = kernel.new_zeros(last.in_channels + 1, inputs + 1, *window)
    outer = kernel.new_zeros(outputs + 1, last.in_channels + 1, *taps)
    # One row and column more, so that the index -1 of padded places reads zeros and what it writes can be cut off.
    left_over = F.pad(kernel, (0, 0, 0, 0, 0, 1, 0, 1))
    rounds = list(_rounds(before, last))
    for blocks in rounds:
        where = blocks.outputs[:, :, None], blocks.inputs[:, None, :]
        cut = left_over[where]
        left, right = _factor_blocks(cut, blocks, window, taps, moments)
        inner[blocks.middle[:, :, None], blocks.inputs[:, None, :]] = left
        outer[blocks.outputs[:, :, None], blocks.middle[:, None, :]] = right
        if len(rounds) > 1:
            fitted = torch.einsum("bomxy,bmivw->boixvyw", right, left).flatten(3, 4).flatten(4, 5)
            left_over[where] = cut - fitted
            left_over[-1], left_over[:, -1] = 0, 0
    placed = outer.new_zeros(outputs, last.in_channels, *last.kernel_size)
    placed[:, :, tap[0] : tap[0] + taps[0], tap[1] : tap[1] + taps[1]] = outer[:-1, :-1]
    return inner[:-1, :-1], placed


def _factor_blocks(
    cut: Tensor, blocks: _Blocks, window: Size, taps: Size, moments: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Inner kernels (B, middle, inputs, *window) and outer ones (B, outputs, middle, *taps) of blocks."""
    count, outputs, inputs = cut.shape[:3]
    middle = blocks.middle.shape[1]
    split = cut.reshape(count, outputs, inputs, window[0], taps[0], window[1], taps[1]).permute(0, 2, 3, 5, 1, 4, 6)
    matrices = split.reshape(count, inputs * window[0] * window[1], outputs * taps[0] * taps[1])
    rank = min(middle, *matrices.shape[1:])
    left, right = factor_matrices(matrices, rank, moments, blocks.first_groups)
    if moments is None:
        # Outer kernels of length one pass every error of the inner kernel on as it is.
        size = right.norm(dim=2).clamp_min(torch.finfo(right.dtype).tiny)
        left, right = left * size[:, None], right / size[:, :, None]
    inner = F.pad(left.mT, (0, 0, 0, middle - rank)).reshape(count, middle, inputs, *window)
    outer = F.pad(right, (0, 0, 0, middle - rank)).reshape(count, middle, outputs, *taps)
    return inner, outer.transpose(1, 2)


def _window_of(kernel: Tensor, last: Factor) -> Size:
    """Extent of the kernel that the stages before the last factor have."""
    height, width = (kernel.shape[2 + axis] - last.kernel_size[axis] + 1 for axis in (0, 1))
    return height, width


def _without_shared_taps(kernel: Tensor, window: Size) -> tuple[Tensor, Size, Size]:
    """The part of a kernel that remains if the last factor keeps one tap along axes where others have taps too.

    Returns:
        The part with the most energy, (O, I, ...); how many taps the last factor keeps; and which one is the first.
    """
    taps, place = [1, 1], [0, 0]
    for axis in (0, 1):
        dim = 2 + axis
        if window[axis] == 1:
            taps[axis] = kernel.shape[dim]
            continue
        starts = range(kernel.shape[dim] - window[axis] + 1)
        place[axis] = max(starts, key=lambda start: float(kernel.narrow(dim, start, window[axis]).norm()))
        kernel = kernel.narrow(dim, place[axis], window[axis])
    return kernel, (taps[0], taps[1]), (place[0], place[1])


def _rounds(before: tuple[Stage, ...], last: Factor) -> Iterator[_Blocks]:
    """The blocks of a kernel: for each group of the last factor one for each set of inputs that its channels see.

    All at once if the sets of a group do not overlap, as in a chain of two; else the n-th of each group in round n.
    """
    ((_, masks),) = receptive_field(Chain(before)).fields
    per_group: list[list[_Block]] = []
    output = channel = 0
    for ins, outs in zip(last.in_groups, last.out_groups, strict=True):
        sets: dict[int, list[int]] = {}
        for middle in range(channel, channel + ins):
            sets.setdefault(masks[middle], []).append(middle)
        if ins and outs:  # groups filled up with zeros may have none
            outputs = list(range(output, output + outs))
            per_group.append([(outputs, mask, middle) for mask, middle in sets.items()])
        output, channel = output + outs, channel + ins
    if all(_is_disjoint([mask for _, mask, _ in blocks]) for blocks in per_group):
        yield _padded([block for blocks in per_group for block in blocks], before)
    else:
        for nth in zip_longest(*per_group):
            yield _padded([block for block in nth if block is not None], before)


_Block = tuple[list[int], int, list[int]]
"""Outputs, inputs as bits of a number, middle channels."""


def _is_disjoint(masks: list[int]) -> bool:
    return sum(mask.bit_count() for mask in masks) == reduce(or_, masks).bit_count()


def _padded(blocks: list[_Block], before: tuple[Stage, ...]) -> _Blocks:
    """Blocks as one batch of indices."""
    first = Chain(before).factors[0]
    bits = {mask: [i for i in range(first.in_channels) if mask >> i & 1] for mask in {mask for _, mask, _ in blocks}}
    group_of = torch.arange(first.groups).repeat_interleave(torch.tensor(first.in_groups))

    def batch(rows: list[list[int]]) -> Tensor:
        return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=-1)

    inputs = batch([bits[mask] for _, mask, _ in blocks])
    return _Blocks(
        outputs=batch([outputs for outputs, _, _ in blocks]),
        inputs=inputs,
        middle=batch([middle for _, _, middle in blocks]),
        first_groups=group_of[inputs[:, 0]],
    )


def _with_even_scale(chain: Chain, weights: list[Tensor]) -> list[Tensor]:
    """The same chain with weights of equal size on both sides of every middle channel, which int8 wants."""
    weights = list(weights)
    factors = chain.factors
    orders = _orders_between(chain)
    for i, order in enumerate(orders):
        before = weights[i].flatten(1).norm(dim=1)[order]
        columns = split_groups(weights[i + 1], factors[i + 1].out_groups).transpose(1, 2).flatten(2).norm(dim=2)
        after = join_groups(columns, factors[i + 1].in_groups)
        is_used = (before > 0) & (after > 0)
        scale = torch.where(is_used, (after / before.clamp_min(1e-300)).sqrt(), 1.0)
        own = torch.empty_like(scale)
        own[order] = scale
        weights[i] = weights[i] * own[:, None, None, None]
        per_group = split_groups(scale, factors[i + 1].in_groups).repeat_interleave(
            torch.tensor(factors[i + 1].out_groups), 0
        )
        weights[i + 1] = weights[i + 1] / torch.where(per_group == 0, 1.0, per_group)[:, :, None, None]
    return weights


def _orders_between(chain: Chain) -> list[Tensor]:
    """For each pair of neighbouring factors: which output of the first each input of the second is."""
    orders = []
    channels, order = 0, torch.arange(0)
    for stage in chain.stages:
        if isinstance(stage, Shuffle):
            order = torch.tensor(stage.order(channels))
        elif isinstance(stage, Factor):
            if channels:
                orders.append(order)
            channels = stage.out_channels
            order = torch.arange(channels)
    return orders
