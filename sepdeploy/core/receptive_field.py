"""The volumetric receptive field of a form: which channels, at which pixels, each output channel sees.

The volumetric receptive field is the Cartesian product of a convolution's spatial field and its channel field
("Optimized Separable Convolution", section 2.2). It is computed by following every channel through the stages, not
taken from the hyper-parameters: groups of uneven size, shuffles and towers are all followed as they run.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from operator import or_

from sepdeploy.core.chain import Activation, Chain, ChainSum, Factor, Norm, Shuffle, Size, Slice, Stage, Towers

__all__ = ["ReceptiveField", "receptive_field"]

_Pixels = tuple[frozenset[int], frozenset[int]]


@dataclass(frozen=True, slots=True)
class ReceptiveField:
    """What the outputs of a form see, as a union of Cartesian products.

    Attributes:
        in_channels: Input channels.
        fields: Rows and columns, as offsets in input pixels from the top left of the position that an output belongs
            to, and for each output channel the input channels that it sees at them, as bits of a number.
    """

    in_channels: int
    fields: tuple[tuple[_Pixels, tuple[int, ...]], ...]

    @property
    def channels(self) -> tuple[int, ...]:
        """How many input channels each output channel sees."""
        per_output = zip(*(masks for _, masks in self.fields), strict=True)
        return tuple(reduce(or_, masks).bit_count() for masks in per_output)

    @property
    def window(self) -> Size:
        """Height and width of the smallest window, in input pixels, that holds every pixel that is seen."""
        rows = set[int]().union(*(rows for (rows, _), _ in self.fields))
        cols = set[int]().union(*(cols for (_, cols), _ in self.fields))
        return max(rows) - min(rows) + 1, max(cols) - min(cols) + 1

    def covers(self, other: ReceptiveField) -> bool:
        """Whether every output sees at least the channels and pixels that it sees in `other`."""
        return all(
            all(mine & theirs == theirs for mine, theirs in zip(self._seen_at(row, col), masks, strict=True))
            for (rows, cols), masks in other.fields
            for row in rows
            for col in cols
        )

    def share_of(self, other: ReceptiveField) -> float:
        """Share of what the outputs see in `other` that they also see here, in [0, 1]."""
        seen = total = 0
        for (rows, cols), masks in other.fields:
            total += sum(mask.bit_count() for mask in masks) * len(rows) * len(cols)
            for row in rows:
                for col in cols:
                    mine = self._seen_at(row, col)
                    seen += sum((a & b).bit_count() for a, b in zip(mine, masks, strict=True))
        return seen / total

    def _seen_at(self, row: int, col: int) -> list[int]:
        """Input channels that each output sees at one pixel."""
        masks = [masks for (rows, cols), masks in self.fields if row in rows and col in cols]
        return [reduce(or_, each) for each in zip(*masks, strict=True)] if masks else [0] * len(self.fields[0][1])


def receptive_field(form: ChainSum | Chain | Factor) -> ReceptiveField:
    """The volumetric receptive field of every output channel.

    >>> depthwise, pointwise = Factor(4, 4, (3, 3), groups=4), Factor(4, 8, (1, 1))
    >>> receptive_field(depthwise).channels, receptive_field(Chain((depthwise, pointwise))).channels[0]
    ((1, 1, 1, 1), 4)
    """
    if isinstance(form, ChainSum):
        stages: tuple[Stage, ...] = form.terms[0].stages if len(form.terms) == 1 else (Towers(form.terms, "sum"),)
    else:
        stages = form.stages if isinstance(form, Chain) else (form,)
    in_channels = form.in_channels
    start = {(frozenset([0]), frozenset([0])): tuple(1 << channel for channel in range(in_channels))}
    fields, _ = _through(stages, start, (1, 1))
    return ReceptiveField(in_channels, tuple(fields.items()))


_Fields = dict[_Pixels, tuple[int, ...]]


def _through(stages: Iterable[Stage], fields: _Fields, stride: Size) -> tuple[_Fields, Size]:
    """Fields after the stages, and how many input pixels apart neighbouring outputs then are."""
    for stage in stages:
        if isinstance(stage, Factor):
            fields = _through_factor(stage, fields, stride)
            stride = (stride[0] * stage.stride[0], stride[1] * stage.stride[1])
        elif isinstance(stage, Shuffle):
            fields = {pixels: tuple(masks[i] for i in stage.order(len(masks))) for pixels, masks in fields.items()}
        elif isinstance(stage, Slice):
            fields = {pixels: masks[stage.start : stage.stop] for pixels, masks in fields.items()}
        elif isinstance(stage, Towers):
            branches = [_through(branch.stages, fields, stride) for branch in stage.branches]
            fields, stride = _joined([branch for branch, _ in branches], stage), branches[0][1]
        elif not isinstance(stage, Norm | Activation):
            raise TypeError(f"no receptive field is known for {stage}")
    return fields, stride


def _through_factor(factor: Factor, fields: _Fields, stride: Size) -> _Fields:
    """Every output of a group sees what all its inputs see, from every tap of the kernel."""
    result: _Fields = {}
    for (rows, cols), masks in fields.items():
        pixels = (_reached(rows, factor, 0, stride), _reached(cols, factor, 1, stride))
        outputs: list[int] = []
        start = 0
        for ins, outs in zip(factor.in_groups, factor.out_groups, strict=True):
            outputs += [reduce(or_, masks[start : start + ins], 0)] * outs
            start += ins
        result[pixels] = _united(result.get(pixels), tuple(outputs))
    return result


def _reached(offsets: frozenset[int], factor: Factor, axis: int, stride: Size) -> frozenset[int]:
    """Offsets along one axis that the taps of a kernel reach from `offsets`."""
    padding = factor.padding[2 * axis]
    taps = [stride[axis] * (factor.dilation[axis] * tap - padding) for tap in range(factor.kernel_size[axis])]
    return frozenset(offset + tap for offset in offsets for tap in taps)


def _joined(branches: list[_Fields], towers: Towers) -> _Fields:
    """Sums see what any branch sees; concatenated channels see what their own branch sees."""
    result: _Fields = {}
    place = 0
    for fields, branch in zip(branches, towers.branches, strict=True):
        after = towers.out_channels - place - branch.out_channels
        for pixels, masks in fields.items():
            padded = (0,) * place + masks + (0,) * after if towers.join == "concat" else masks
            result[pixels] = _united(result.get(pixels), padded)
        place += branch.out_channels
    return result


def _united(first: tuple[int, ...] | None, second: tuple[int, ...]) -> tuple[int, ...]:
    return second if first is None else tuple(a | b for a, b in zip(first, second, strict=True))
