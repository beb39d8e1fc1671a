"""What `sepdeploy design` is told and what it finds: separable variants of a network, to be trained from scratch."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from sepdeploy.core.chain import Activation, ActivationName, Chain, ChainSum, Factor, Norm, Stage
from sepdeploy.core.plan import Reason, SchemeOptions
from sepdeploy.core.report import NetworkCost
from sepdeploy.errors import UsageError

__all__ = [
    "ACTIVATIONS",
    "FROM_SCRATCH",
    "MOST_MULTIPLIER",
    "ActivationName",
    "DesignOptions",
    "DesignResult",
    "Match",
    "Middle",
    "SchemeCost",
    "with_middle",
]

Match = Literal["macs", "params", "both"]
"""Which cost of the original a channel multiplier matches; 'both': neither is exceeded."""

Middle = Literal["linear", "norm", "norm_activation"]
"""What stands between the convolutions of a chain."""

ACTIVATIONS: tuple[ActivationName, ...] = get_args(ActivationName)

MOST_MULTIPLIER = 64
"""Largest channel multiplier: a variant that is still too cheap has hardly any separable convolution."""

FROM_SCRATCH = SchemeOptions(terms=1, rank_ratio=1 / 3)
"""Hyper-parameters of the forms that are trained from scratch in the literature.

One depthwise-separable pair, and for spatially separable 3x3 kernels as many middle channels as the narrower end has
(table 1 of "Optimized Separable Convolution"). Imitating a trained kernel takes more terms and is `SchemeOptions`' own
default.
"""


@dataclass(frozen=True, slots=True)
class DesignOptions:
    """What `sepdeploy design` does; field by field the options of the command line.

    Attributes:
        arch: Architecture, as for `ConvertOptions`.
        input_shape: (C, H, W) that MACs are counted for.
        scheme: Name of the scheme.
        scheme_options: Its hyper-parameters.
        match: Which cost of the original the channel multiplier matches.
        multiplier: The channel multiplier itself; None searches it.
        step: Multipliers that are tried are multiples of this.
        width_argument: Argument of the architecture's factory that scales its channels; None finds it by name.
        middle: What stands between the convolutions of a chain.
        activation: The activation for `middle` 'norm_activation'.
        replaces_pointwise: Whether 1x1 convolutions are replaced too.
        seed: Seed of the fresh weights.
        output: Folder for a bundle that `sepdeploy.load` reads; None writes nothing.
        command: The command line, for the record.

    Raises:
        UsageError: if an option is out of range.
    """

    arch: str
    input_shape: tuple[int, int, int] = (3, 224, 224)
    scheme: str = "optimized_separable"
    scheme_options: SchemeOptions = FROM_SCRATCH
    match: Match = "both"
    multiplier: float | None = None
    step: float = 0.125
    width_argument: str | None = None
    middle: Middle = "linear"
    activation: ActivationName = "relu"
    replaces_pointwise: bool = False
    seed: int = 0
    output: Path | None = None
    command: str = ""

    def __post_init__(self) -> None:
        for value, known in (
            (self.match, get_args(Match)),
            (self.middle, get_args(Middle)),
            (self.activation, ACTIVATIONS),
        ):
            if value not in known:
                raise UsageError(f"there is no '{value}'; choose one of {', '.join(known)}")
        if min(self.input_shape) < 1 or self.seed < 0:
            raise UsageError(
                f"--input-shape must be positive and --seed at least 0, got {self.input_shape}, {self.seed}"
            )
        for name, number in (("--multiplier", self.multiplier), ("--step", self.step)):
            if number is not None and not 0 < number <= MOST_MULTIPLIER:
                raise UsageError(f"{name} must be above 0 and at most {MOST_MULTIPLIER}, got {number}")


@dataclass(frozen=True, slots=True)
class DesignResult:
    """One separable variant of a network beside the original.

    Attributes:
        name: In the paper's style: prefix, network, channel multiplier ('o-resnet20_m3.625').
        scheme: Name of the scheme.
        arch: The architecture with the channel multiplier in its arguments.
        multiplier: Factor on the channels of the original.
        input_shape: (C, H, W) that MACs are counted for.
        original: Cost of the original network.
        variant: Cost of this one.
        replaced: Convolutions that became separable.
        keeps_receptive_field: Whether every one of them sees what the dense convolution sees.
    """

    name: str
    scheme: str
    arch: str
    multiplier: float
    input_shape: tuple[int, int, int]
    original: NetworkCost
    variant: NetworkCost
    replaced: int
    keeps_receptive_field: bool


@dataclass(frozen=True, slots=True)
class SchemeCost:
    """What one scheme makes of one convolution: a row of table 1 of "Optimized Separable Convolution".

    Attributes:
        name: Of the scheme.
        prefix: What the literature puts before a network's name.
        summary: What it is.
        complexity: Its weights as a formula in C, K, T, r, g.
        option_names: The hyper-parameters that it reads.
        refusal: Why it cannot replace this convolution; None if it can. The numbers are then None.
        form: Its convolutions in words.
        params: Weights.
        macs: Multiply-accumulates for one image.
        ratio: Weights relative to the dense convolution.
        keeps_receptive_field: Whether it sees what the dense convolution sees.
    """

    name: str
    prefix: str
    summary: str
    complexity: str
    option_names: tuple[str, ...]
    refusal: Reason | None = None
    form: str | None = None
    params: int | None = None
    macs: int | None = None
    ratio: float | None = None
    keeps_receptive_field: bool | None = None


def with_middle(form: ChainSum, middle: Middle, activation: ActivationName = "relu") -> ChainSum:
    """The form with a batch norm, or a batch norm and an activation, after each convolution but the last of a chain.

    A middle norm folds away in inference. With activations the chain computes no convolution any more: it is the block
    of MobileNets, whose last convolution stays linear ("MobileNetV2", section 3.2).

    Args:
        form: The chains; towers are left as they are.
        middle: What to put in.
        activation: Which activation, for 'norm_activation'.

    >>> pair = Chain((Factor(8, 8, (3, 3), groups=8), Factor(8, 16, (1, 1))))
    >>> [stage.kind for stage in with_middle(ChainSum((pair,)), "norm_activation").terms[0].stages]
    ['factor', 'norm', 'activation', 'factor']
    """
    if middle == "linear":
        return form
    return ChainSum(tuple(_with_middle(term, middle, activation) for term in form.terms))


def _with_middle(chain: Chain, middle: Middle, activation: ActivationName) -> Chain:
    stages: list[Stage] = []
    factors = sum(isinstance(stage, Factor) for stage in chain.stages)
    for stage in chain.stages:
        stages.append(stage)
        if isinstance(stage, Factor):
            factors -= 1
            if factors:
                stages.append(Norm(stage.out_channels))
                stages += [Activation(activation)] if middle == "norm_activation" else []
    return Chain(tuple(stages))
