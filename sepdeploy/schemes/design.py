"""Algorithm 1 of "Optimized Separable Convolution": groups, channels and kernels of an N-factor chain.

A chain of N grouped convolutions with C_1, ..., C_{N+1} channels has sum_l C_{l+1} n_l KH_l KW_l weights, where n_l =
C_l / g_l is the number of channels per group (equation 12). It sees the whole volume of the dense kernel if the kernels
add up (equations 13, 14), the n_l multiply to at least gamma * C_1 (equation 15) and there are no more groups than
channels (equation 16). Theorem 1: fewest weights have chains with the whole kernel in one factor and equal costs
C_{l+1} n_l KH_l KW_l.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

from sepdeploy.core.chain import Chain, Factor, Shuffle, Size
from sepdeploy.core.conv import ConvSpec
from sepdeploy.core.plan import MAX_FACTORS, SchemeOptions
from sepdeploy.core.receptive_field import receptive_field
from sepdeploy.errors import UsageError

__all__ = ["DESIGN_OPTIONS", "ChainDesign", "assemble_chain", "balanced_groups", "design_chain", "middle_channels"]

DESIGN_OPTIONS = (
    "factors",
    "overlap",
    "policy",
    "middle_channels",
    "kernel_position",
    "kernel_sizes",
    "groups",
    "min_group_channels",
    "group_rounding",
)
"""Fields of `SchemeOptions` that Algorithm 1 reads."""

_DIVISOR_ALLOWANCE = 1.1
"""Weights that 'auto' pays for groups that divide the channels: they run as one convolution instead of three."""

_FAILURES_PER_REACH = 8
"""Choices of groups that may miss a channel before the search asks for larger groups."""

_SLACKS = (1.0, 1.05, 1.1, 1.2, 1.35, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0, 8.0)
"""Factors on the overlap for groups of uneven size, which at exactly the overlap asked for may miss a channel."""

_FEW_FACTORS = 4
"""Up to here all ways to round are tried; beyond, those that matter most."""


@dataclass(frozen=True, slots=True)
class ChainDesign:
    """What Algorithm 1 returns.

    Attributes:
        channels: C_1, ..., C_{N+1}.
        kernel_sizes: (KH_l, KW_l) of the N factors.
        groups: g_l of the N factors.
        pads_groups: Whether groups that do not divide the channels are filled up with zeros.
    """

    channels: tuple[int, ...]
    kernel_sizes: tuple[Size, ...]
    groups: tuple[int, ...]
    pads_groups: bool = False

    @property
    def params(self) -> int:
        """Weights of all factors."""
        return sum(factor.params for factor in self.factors)

    @property
    def factors(self) -> tuple[Factor, ...]:
        """The factors, with stride, padding and dilation left at their defaults."""
        return tuple(
            Factor(self.channels[i], self.channels[i + 1], self.kernel_sizes[i], groups=g, pads_groups=self.pads_groups)
            for i, g in enumerate(self.groups)
        )

    @property
    def chain(self) -> Chain:
        """The chain, with shuffles between factors that are both grouped."""
        return Chain(tuple(_with_shuffles(self.factors)))

    @property
    def sees_all_channels(self) -> bool:
        """Whether every output channel sees every input channel, computed on the chain."""
        return min(receptive_field(self.chain).channels) == self.channels[0]


@lru_cache(maxsize=4096)
def design_chain(
    in_channels: int, out_channels: int, kernel_size: Size, options: SchemeOptions, *, is_spatial: bool = False
) -> ChainDesign:
    """Algorithm 1.

    Args:
        in_channels: C_1.
        out_channels: C_{N+1}.
        kernel_size: (KH, KW) of the dense kernel.
        options: N, gamma, policy, presets and rounding.
        is_spatial: Whether two neighbouring factors take KHx1 and 1xKW instead of one taking KHxKW.

    Raises:
        UsageError: if the presets contradict each other or the geometry.
    """
    counts = _factor_counts(in_channels, out_channels, kernel_size, options, is_spatial=is_spatial)
    designs = (_design(in_channels, out_channels, kernel_size, options, n, is_spatial=is_spatial) for n in counts)
    return min(designs, key=lambda design: design.params)


def assemble_chain(design: ChainDesign, spec: ConvSpec) -> Chain:
    """The chain in the place of a convolution: with its stride, zero padding and dilation.

    Along each axis the first factor with taps pads (what is padded before a 1x1 would be zero after it too) and the
    last one strides, so that every tap in between still sees single pixels.
    """
    first, last = zip(*(_first_and_last(design.kernel_sizes, axis) for axis in (0, 1)), strict=True)
    factors = []
    for index, factor in enumerate(design.factors):
        rows = spec.zero_padding[:2] if index == first[0] else (0, 0)
        columns = spec.zero_padding[2:] if index == first[1] else (0, 0)
        factors.append(
            Factor(
                factor.in_channels,
                factor.out_channels,
                factor.kernel_size,
                stride=(spec.stride[0] if index == last[0] else 1, spec.stride[1] if index == last[1] else 1),
                padding=(*rows, *columns),
                dilation=(
                    spec.dilation[0] if factor.kernel_size[0] > 1 else 1,
                    spec.dilation[1] if factor.kernel_size[1] > 1 else 1,
                ),
                groups=factor.groups,
                pads_groups=factor.pads_groups,
            )
        )
    return Chain(tuple(_with_shuffles(tuple(factors))))


def middle_channels(in_channels: int, out_channels: int, options: SchemeOptions) -> int:
    """C_2 = ... = C_N by policy, at least 1 (section 2.3)."""
    return max(
        1,
        {
            "normal": min(in_channels, out_channels),
            "linear": (in_channels + out_channels) // 2,
            "bottleneck": max(in_channels, out_channels) // 4,
            "inverted": 4 * min(in_channels, out_channels),
        }[options.policy],
    )


def balanced_groups(
    channels: tuple[int, ...], kernel_sizes: tuple[Size, ...], overlap: float, preset: dict[int, int], caps: list[int]
) -> list[float]:
    """Groups g_l = C_l / n_l that balance the costs of all factors, not yet whole numbers (equation 17).

    Where a g_l leaves its range [1, cap], it is fixed at that bound and the others are solved for again: the masked
    re-optimization of Algorithm 1, one side at a time, so that the result is the minimum within the ranges.

    Args:
        channels: C_1, ..., C_{N+1}.
        kernel_sizes: (KH_l, KW_l).
        overlap: gamma.
        preset: Factor -> groups that are given.
        caps: Largest allowed groups of each factor.
    """
    costs = [channels[i + 1] * math.prod(kernel) for i, kernel in enumerate(kernel_sizes)]
    fixed: dict[int, float] = dict(preset)
    while True:
        free = [i for i in range(len(costs)) if i not in fixed]
        # prod n_l >= gamma * C_1 with equal n_l * cost_l over the free factors.
        needed = overlap * channels[0] / math.prod(channels[i] / groups for i, groups in fixed.items())
        level = (needed * math.prod(costs[i] for i in free)) ** (1 / len(free)) if free else 0.0
        groups = {i: channels[i] * costs[i] / level for i in free}
        too_few = {i: 1.0 for i, g in groups.items() if g < 1}
        too_many = {i: float(caps[i]) for i, g in groups.items() if g > caps[i]}
        if not too_few and not too_many:
            return [fixed[i] if i in fixed else groups[i] for i in range(len(costs))]
        # With both, only the side that is further out is sure to stay at its bounds: solving again moves the rest
        # towards the other side.
        surplus = math.prod(groups[i] / cap for i, cap in too_many.items())
        shortage = math.prod(1 / groups[i] for i in too_few)
        fixed |= too_many if surplus > shortage else too_few


def _factor_counts(
    in_channels: int, out_channels: int, kernel_size: Size, options: SchemeOptions, *, is_spatial: bool
) -> range:
    """The N to try: that of the presets, the given one, or all up to one above log(gamma * C * K^2) (equation 21)."""
    least = 2 if is_spatial else 1
    given = len(options.kernel_sizes) or len(options.groups) or options.factors
    if len(options.middle_channels) > 1 and not (options.kernel_sizes or options.groups):
        given = len(options.middle_channels) + 1
    if given is not None:
        if given < least:
            raise UsageError(f"Kx1 and 1xK need at least 2 factors, got --factors {given}")
        return range(given, given + 1)
    volume = options.overlap * max(in_channels, out_channels) * math.prod(kernel_size)
    return range(least, min(MAX_FACTORS, max(least, math.ceil(math.log(max(volume, 1.0))) + 1)) + 1)


def _design(
    in_channels: int, out_channels: int, kernel_size: Size, options: SchemeOptions, count: int, *, is_spatial: bool
) -> ChainDesign:
    middle = options.middle_channels or (middle_channels(in_channels, out_channels, options),)
    if len(middle) == 1:
        middle = middle * (count - 1)
    if len(middle) != count - 1:
        raise UsageError(f"{count} factors have {count - 1} middle channel counts, got {len(middle)}")
    channels = (in_channels, *middle, out_channels)
    kernels = _kernel_sizes(kernel_size, options, count, is_spatial=is_spatial)
    caps = [max(1, min(channels[i], channels[i + 1]) // options.min_group_channels) for i in range(count)]
    preset = _preset_groups(channels, options, count)
    balanced = balanced_groups(channels, kernels, options.overlap, preset, caps)

    def best(choices: Iterable[tuple[int, ...]], below: float) -> ChainDesign | None:
        must_see_all = options.overlap >= 1 and len(preset) < count
        return _cheapest(channels, kernels, choices, below, must_see_all=must_see_all)

    if options.group_rounding == "padded":
        return ChainDesign(channels, kernels, _authors_groups(channels, balanced, options.overlap, preset, caps), True)
    found = best(_divisor_choices(channels, balanced, options.overlap, preset, caps), math.inf)
    if options.group_rounding != "divisor":
        allowance = _DIVISOR_ALLOWANCE if options.group_rounding == "auto" else 1.0
        below = found.params / allowance if found else math.inf
        found = best(_uneven_choices(channels, kernels, options.overlap, preset, caps), below) or found
    return found or ChainDesign(channels, kernels, _dense_groups(preset, count))


def _cheapest(
    channels: tuple[int, ...],
    kernels: tuple[Size, ...],
    choices: Iterable[tuple[int, ...]],
    below: float,
    *,
    must_see_all: bool,
) -> ChainDesign | None:
    """The choice of groups with the fewest weights, less than `below`, of those that see every channel if they must.

    Long chains with uneven groups often just miss a channel: after some failures the search goes on among choices with
    more channels per group. None if there is no such choice.
    """
    taps = [math.prod(kernel) for kernel in kernels]
    weights = {groups: _weights(channels, taps, groups) for groups in set(choices)}
    ordered = sorted((w, groups) for groups, w in weights.items() if w < below)
    least_reach, failures = 0.0, 0
    for _, groups in ordered:
        reach = math.prod(channels[i] / g for i, g in enumerate(groups)) / channels[0]
        if reach < least_reach:
            continue
        design = ChainDesign(channels, kernels, groups)
        if not must_see_all or design.sees_all_channels:
            return design
        failures += 1
        if failures % _FAILURES_PER_REACH == 0:
            least_reach = 1.2 * max(reach, least_reach)
    return None


def _weights(channels: tuple[int, ...], taps: list[int], groups: tuple[int, ...]) -> int:
    """Weights of a chain with uneven groups, in closed form: sum over groups of in * out, larger groups first."""
    total = 0
    for i, g in enumerate(groups):
        (small_in, more_in), (small_out, more_out) = divmod(channels[i], g), divmod(channels[i + 1], g)
        pairs = g * small_in * small_out + small_in * more_out + small_out * more_in + min(more_in, more_out)
        total += taps[i] * pairs
    return total


def _kernel_sizes(kernel_size: Size, options: SchemeOptions, count: int, *, is_spatial: bool) -> tuple[Size, ...]:
    """KH_l, KW_l: preset, or the whole kernel in factor floor(N / 2), Kx1 and 1xK in it and the next (Algorithm 1)."""
    if options.kernel_sizes:
        for axis in (0, 1):
            extent = sum(size[axis] - 1 for size in options.kernel_sizes) + 1
            if extent != kernel_size[axis]:
                raise UsageError(
                    f"kernels {_printed(options.kernel_sizes)} cover {extent} pixels, not {kernel_size[axis]}: "
                    f"their sizes must add up to {kernel_size[axis]} + {count} - 1"
                )
        return options.kernel_sizes
    last = count - 1 if is_spatial else count
    position = options.kernel_position or max(1, min(last, count // 2))
    if position > last:
        raise UsageError(f"--kernel-position {position} is beyond the last of {last} possible factors")
    sizes: list[Size] = [(1, 1)] * count
    if is_spatial:
        sizes[position - 1], sizes[position] = (kernel_size[0], 1), (1, kernel_size[1])
    else:
        sizes[position - 1] = kernel_size
    return tuple(sizes)


def _preset_groups(channels: tuple[int, ...], options: SchemeOptions, count: int) -> dict[int, int]:
    if options.groups and len(options.groups) != count:
        raise UsageError(f"{count} factors have {count} numbers of groups, got {len(options.groups)}")
    preset = {i: groups for i, groups in enumerate(options.groups) if groups is not None}
    for i, groups in preset.items():
        if groups > min(channels[i], channels[i + 1]):
            raise UsageError(
                f"{groups} groups are more than the {channels[i]} or {channels[i + 1]} channels of factor {i + 1}"
            )
    return preset


def _authors_groups(
    channels: tuple[int, ...], balanced: list[float], overlap: float, preset: dict[int, int], caps: list[int]
) -> tuple[int, ...]:
    """The authors' rounding: all but the first up, then the first as many as the others leave room for, rounded up.

    Rounded up, they may be too many for every output to see every channel; it reproduces their tables.
    """
    groups = [
        preset.get(i, min(math.ceil(g - 1e-9), cap)) for i, (g, cap) in enumerate(zip(balanced, caps, strict=True))
    ]
    if 0 not in preset:
        room = math.prod(channels[1:-1]) / (overlap * math.prod(groups[1:]))
        groups[0] = max(1, min(math.ceil(room - 1e-9), caps[0]))
    return tuple(groups)


def _uneven_choices(
    channels: tuple[int, ...], kernels: tuple[Size, ...], overlap: float, preset: dict[int, int], caps: list[int]
) -> Iterator[tuple[int, ...]]:
    """Every factor but one rounded up or down; the one takes as many groups as they leave room for.

    The same with more overlap than asked for: what groups of uneven size may need to reach every channel.
    """
    free = [i for i in range(len(kernels)) if i not in preset]
    if not free:
        yield tuple(preset[i] for i in range(len(kernels)))
        return
    pivot, *others = free
    for slack in _SLACKS:
        balanced = balanced_groups(channels, kernels, overlap * slack, preset, caps)
        room = math.prod(channels[1:-1]) / (overlap * slack)
        for rounded in _roundings([balanced[i] for i in others], [caps[i] for i in others]):
            groups = preset | dict(zip(others, rounded, strict=True))
            left = math.floor(room / math.prod(groups.values()) + 1e-9)
            if left >= 1 or max(rounded, default=1) == 1:
                groups[pivot] = max(1, min(caps[pivot], left))
                yield tuple(groups[i] for i in range(len(kernels)))


def _roundings(values: list[float], caps: list[int]) -> Iterator[tuple[int, ...]]:
    """Ways to round: all, or for long chains those that round up what is closest to it first."""
    down = [math.floor(value + 1e-9) for value in values]
    up = [min(math.ceil(value - 1e-9), cap) for value, cap in zip(values, caps, strict=True)]
    if len(values) == 1:
        yield from ((g,) for g in range(max(1, down[0] // 2), min(2 * up[0], caps[0]) + 1))
        return
    if len(values) < _FEW_FACTORS:
        yield from product(*map(set, zip(down, up, strict=True)))
        return
    by_fraction = sorted(range(len(values)), key=lambda i: down[i] - values[i])
    for count in range(len(values) + 1):
        yield tuple(up[i] if i in by_fraction[:count] else down[i] for i in range(len(values)))


def _divisor_choices(
    channels: tuple[int, ...], balanced: list[float], overlap: float, preset: dict[int, int], caps: list[int]
) -> Iterator[tuple[int, ...]]:
    """Numbers of groups that divide the channels on both sides, near the balanced ones."""
    room = math.prod(channels[1:-1]) / overlap
    options = []
    for i, target in enumerate(balanced):
        common = math.gcd(channels[i], channels[i + 1])
        divisors = [d for d in range(1, min(common, caps[i]) + 1) if common % d == 0]
        below, above = [d for d in divisors if d <= target], [d for d in divisors if d > target]
        near = below[-3:] + above[:1] if len(balanced) <= _FEW_FACTORS else below[-1:] + above[:1]
        options.append([preset[i]] if i in preset else near)
    for groups in product(*options):
        if math.prod(groups) <= room * (1 + 1e-9) or len(preset) == len(groups):
            yield groups


def _dense_groups(preset: dict[int, int], count: int) -> tuple[int, ...]:
    return tuple(preset.get(i, 1) for i in range(count))


def _with_shuffles(factors: tuple[Factor, ...]) -> Iterator[Factor | Shuffle]:
    """The factors, with a shuffle between two that are both grouped."""
    for index, factor in enumerate(factors):
        if index and factor.groups > 1 and factors[index - 1].groups > 1:
            yield Shuffle(factors[index - 1].groups)
        yield factor


def _first_and_last(kernel_sizes: tuple[Size, ...], axis: int) -> tuple[int, int]:
    """First and last factor with taps along an axis; factor 0 if there is none."""
    with_taps = [i for i, size in enumerate(kernel_sizes) if size[axis] > 1] or [0]
    return with_taps[0], with_taps[-1]


def _printed(kernel_sizes: tuple[Size, ...]) -> str:
    return ", ".join(f"{height}x{width}" for height, width in kernel_sizes)
