"""Chains of grouped convolutions: the one algebra behind every separable convolution.

A `Factor` is a grouped convolution, a `Chain` is a sequence of factors with channel shuffles between them, and a
`ChainSum` is several chains in parallel whose outputs are added (the terms of a network decoupling). `Towers` are
chains side by side within a chain: the forms that lowerings write a grouped convolution in. All are data without
weights: shapes, cost, memory and receptive field are functions of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Literal

from sepdeploy.core.stages import (
    Activation,
    ActivationName,
    Factor,
    Norm,
    Padding,
    Run,
    Shuffle,
    Size,
    Slice,
    group_sizes,
)
from sepdeploy.errors import UsageError

__all__ = [
    "Activation",
    "ActivationName",
    "Chain",
    "ChainSum",
    "Factor",
    "Norm",
    "Padding",
    "Run",
    "Shuffle",
    "Size",
    "Slice",
    "Stage",
    "Towers",
    "group_sizes",
]


@dataclass(frozen=True, slots=True)
class Towers:
    """Chains on the same input, joined: channels one after the other ('concat'), or added up ('sum').

    Attributes:
        branches: At least one chain; all read the same channels, and for a sum all return as many.
        join: How their outputs become one.

    Raises:
        UsageError: if there is no branch or they do not fit together.
    """

    branches: tuple[Chain, ...]
    join: Literal["concat", "sum"]
    kind: Literal["towers"] = "towers"

    def __post_init__(self) -> None:
        if len({branch.in_channels for branch in self.branches}) != 1:
            raise UsageError("towers must read the same channels")
        if self.join == "sum" and len({branch.out_channels for branch in self.branches}) != 1:
            raise UsageError("towers that are added up must return as many channels each")

    @property
    def in_channels(self) -> int:
        """Input channels."""
        return self.branches[0].in_channels

    @property
    def out_channels(self) -> int:
        """Output channels."""
        outputs = [branch.out_channels for branch in self.branches]
        return sum(outputs) if self.join == "concat" else outputs[0]

    def output_size(self, input_size: Size) -> Size:
        """Spatial size of the output for an input of `input_size`, both (H, W) in pixels."""
        return self.branches[0].output_size(input_size)


Stage = Factor | Shuffle | Norm | Activation | Slice | Towers


@dataclass(frozen=True, slots=True)
class Chain:
    """Grouped convolutions applied one after the other, with channel shuffles between them.

    Attributes:
        stages: At least one that fixes the channels (a factor, a slice or towers); each reads what the one before
            it returns.

    Raises:
        UsageError: if the channels of two neighbours differ, or none says how many there are.
    """

    stages: tuple[Stage, ...]

    def __post_init__(self) -> None:
        channels = self.in_channels
        for stage in self.stages:
            if isinstance(stage, Norm):
                expected = stage.channels
            else:
                expected = channels if isinstance(stage, Shuffle | Activation) else stage.in_channels
            if expected != channels:
                raise UsageError(f"a stage with {channels} outputs cannot feed one with {expected} inputs")
            if isinstance(stage, Shuffle) and not 1 <= stage.groups <= channels:
                raise UsageError(f"{channels} channels cannot be shuffled in {stage.groups} groups")
            if isinstance(stage, Factor | Slice | Towers):
                channels = stage.out_channels

    @property
    def in_channels(self) -> int:
        """Input channels."""
        for stage in self.stages:
            if isinstance(stage, Norm):
                return stage.channels
            if not isinstance(stage, Shuffle | Activation):
                return stage.in_channels
        raise UsageError("a chain needs at least one convolution")

    @property
    def out_channels(self) -> int:
        """Output channels."""
        return self._walk((1, 1))[-1][1]

    @property
    def factors(self) -> tuple[Factor, ...]:
        """The convolutions in order, those of towers branch by branch."""
        return tuple(stage for stage in self.leaves() if isinstance(stage, Factor))

    def leaves(self) -> Iterator[Factor | Shuffle | Norm | Activation | Slice]:
        """All stages in order, those of towers branch by branch."""
        for stage in self.stages:
            if isinstance(stage, Towers):
                for branch in stage.branches:
                    yield from branch.leaves()
            else:
                yield stage

    @property
    def params(self) -> int:
        """Weights of all factors and norms, and the biases of factors that have them."""
        return sum(stage.params for stage in self.leaves() if isinstance(stage, Factor | Norm))

    def output_size(self, input_size: Size) -> Size:
        """Spatial size of the output for an input of `input_size`, both (H, W) in pixels."""
        return self._walk(input_size)[-1][2]

    def macs(self, input_size: Size) -> int:
        """Multiply-accumulates for one image of `input_size` (H, W)."""
        steps = self._walk(input_size)
        return sum(_macs(after[0], before[2]) for before, after in pairwise(steps))

    def activation_bytes(self, input_size: Size, bytes_per_value: int = 4) -> int:
        """Bytes that the stages write for one image of `input_size`: every intermediate tensor, and the output."""
        steps = self._walk(input_size)
        return bytes_per_value * sum(_written(after, before) for before, after in pairwise(steps))

    def peak_activation_bytes(self, input_size: Size, bytes_per_value: int = 4) -> int:
        """Most bytes of activations alive at once for one image of `input_size`, input and output included."""
        return bytes_per_value * self._peak(input_size, keeps_input=False)

    def _walk(self, input_size: Size) -> list[_Step]:
        """(stage, channels and size of its output) for the input itself (no stage) and after each stage."""
        steps: list[_Step] = [(None, self.in_channels, input_size)]
        for stage in self.stages:
            _, channels, size = steps[-1]
            if isinstance(stage, Factor | Slice | Towers):
                channels = stage.out_channels
            if isinstance(stage, Factor | Towers):
                size = stage.output_size(size)
            steps.append((stage, channels, size))
        return steps

    def _peak(self, input_size: Size, *, keeps_input: bool) -> int:
        """Most values alive at once; with `keeps_input` something after the chain still reads its input."""
        steps = self._walk(input_size)
        kept = _values(steps[0]) if keeps_input else 0
        first, *others = (_alive(a, b, keeps_input=keeps_input and b is steps[0]) for b, a in pairwise(steps))
        return max([first, *(kept + alive for alive in others)])


@dataclass(frozen=True, slots=True)
class ChainSum:
    """Chains in parallel on the same input, their outputs added.

    Attributes:
        terms: At least one chain; all have the same input and output channels.

    Raises:
        UsageError: if there is no term or two terms differ in channels.
    """

    terms: tuple[Chain, ...]

    def __post_init__(self) -> None:
        ends = {(term.in_channels, term.out_channels) for term in self.terms}
        if len(ends) != 1:
            raise UsageError(f"the terms of a sum must agree in their input and output channels, got {sorted(ends)}")

    @property
    def in_channels(self) -> int:
        """Input channels."""
        return self.terms[0].in_channels

    @property
    def out_channels(self) -> int:
        """Output channels."""
        return self.terms[0].out_channels

    def with_output_bias(self) -> ChainSum:
        """The same with a bias on the last factor of the first term.

        Raises:
            UsageError: if the first term does not end in a factor.
        """
        *stages, last = self.terms[0].stages
        if not isinstance(last, Factor):
            raise UsageError("a bias needs a form whose first term ends in a convolution")
        first = Chain((*stages, replace(last, has_bias=True)))
        return ChainSum((first, *self.terms[1:]))

    @property
    def params(self) -> int:
        """Weights of all terms, and the biases of factors that have them."""
        return sum(term.params for term in self.terms)

    def output_size(self, input_size: Size) -> Size:
        """Spatial size of the output for an input of `input_size`, both (H, W) in pixels."""
        return self.terms[0].output_size(input_size)

    def macs(self, input_size: Size) -> int:
        """Multiply-accumulates for one image of `input_size` (H, W)."""
        return sum(term.macs(input_size) for term in self.terms)

    def activation_bytes(self, input_size: Size, bytes_per_value: int = 4) -> int:
        """Bytes that all stages and the additions write for one image of `input_size` (H, W)."""
        height, width = self.output_size(input_size)
        added = (len(self.terms) - 1) * self.out_channels * height * width * bytes_per_value
        return added + sum(term.activation_bytes(input_size, bytes_per_value) for term in self.terms)

    def peak_activation_bytes(self, input_size: Size, bytes_per_value: int = 4) -> int:
        """Most bytes of activations alive at once: terms run one after the other and are added in place."""
        if len(self.terms) == 1:
            return self.terms[0].peak_activation_bytes(input_size, bytes_per_value)
        return bytes_per_value * _alive_in_branches(self.terms, "sum", input_size, keeps_input=False)


_Step = tuple[Stage | None, int, Size]


def _macs(stage: Stage | None, input_size: Size) -> int:
    if isinstance(stage, Towers):
        return sum(branch.macs(input_size) for branch in stage.branches)
    return stage.macs(input_size) if isinstance(stage, Factor) else 0


def _values(step: _Step) -> int:
    _, channels, (height, width) = step
    return channels * height * width


def _written(after: _Step, before: _Step) -> int:
    """Values that one stage writes; norms and activations are fused into the convolution before them."""
    stage = after[0]
    if isinstance(stage, Norm | Activation):
        return 0
    if isinstance(stage, Towers):
        joins = len(stage.branches) - 1 if stage.join == "sum" else 1
        return joins * _values(after) + sum(branch.activation_bytes(before[2], 1) for branch in stage.branches)
    return _values(after)


def _alive(after: _Step, before: _Step, *, keeps_input: bool) -> int:
    """Values alive while one stage runs."""
    stage = after[0]
    if isinstance(stage, Norm | Activation):
        return 0
    if isinstance(stage, Towers):
        return _alive_in_branches(stage.branches, stage.join, before[2], keeps_input=keeps_input)
    return _values(before) + _values(after)


def _alive_in_branches(
    branches: tuple[Chain, ...], join: Literal["concat", "sum"], input_size: Size, *, keeps_input: bool
) -> int:
    """Values alive at the peak of branches that run one after the other, on an input that all read, and are joined."""
    outputs = [_values(branch._walk(input_size)[-1]) for branch in branches]
    if join == "sum":
        kept = [0] + [outputs[0]] * (len(branches) - 1)
        joining = min(2, len(branches)) * outputs[0]
    else:
        kept = [0, *accumulate(outputs)][:-1]
        joining = 2 * sum(outputs)
    last = len(branches) - 1
    peaks = (
        done + branch._peak(input_size, keeps_input=keeps_input or index < last)
        for index, (done, branch) in enumerate(zip(kept, branches, strict=True))
    )
    shared = _values((None, branches[0].in_channels, input_size)) if keeps_input else 0
    return max(shared + joining, *peaks)
