"""The plan: for each convolution of the network, what replaces it or why it stays."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import TYPE_CHECKING, Literal, get_args

from sepdeploy.core.artifact import Precision
from sepdeploy.core.chain import ChainSum, Size
from sepdeploy.errors import UsageError

if TYPE_CHECKING:
    from sepdeploy.core.conv import Trace

__all__ = [
    "MAX_FACTORS",
    "Candidate",
    "Decision",
    "GroupRounding",
    "Kept",
    "Plan",
    "Policy",
    "Reason",
    "Replaced",
    "SchemeOptions",
]


class Reason(Enum):
    """Why a convolution stays as it is; the value is the sentence that the user reads."""

    NOT_CALLED = "the forward pass never runs it"
    NOT_CONV2D = "only 2-D convolutions have separable forms here"
    TRANSPOSED = "transposed convolutions are not supported yet"
    FUNCTIONAL = "it is a functional call, not an nn.Conv2d module, so it cannot be swapped"
    CUSTOM_FORWARD = "its class overrides PyTorch's own computation"
    PARAMETRIZED = "its weight is recomputed on each call (parametrization or weight norm)"
    HAS_HOOKS = "it carries forward hooks, which a replacement would lose"
    SHARED_WEIGHT = "its weight is shared with another module"
    QUANTIZED_OR_NOT_FLOAT = "its weight is not a floating-point tensor"
    NOT_FINITE = "its weight has NaN or infinite values"
    POINTWISE = "a 1x1 kernel has no spatial extent to separate"
    DEPTHWISE = "it is depthwise already"
    ONE_DIMENSIONAL_KERNEL = "a kernel of one row or one column has nothing to separate into two"
    GROUPED = "it is grouped already, and the scheme is about convolutions that read every channel"
    OPTIONS_DO_NOT_FIT = "the scheme's options do not fit its geometry"
    FEW_CHANNELS = "it reads fewer than 4 channels per group, too few for a separable form to pay"
    NOT_CHEAPER = "the separable form needs at least as many multiply-accumulates"
    SCHEME_IS_DENSE = "the dense scheme replaces nothing"
    EXCEEDS_MAX_DROP = "replacing it breaks --max-drop"
    NOT_TRIED = "the guard ended before its turn: the convolutions before it used up --max-drop"
    NOTHING_WEIGHED = "none of its separable forms could be built and measured for the target"
    NOT_FASTER = "none of its separable forms is faster on the target"
    NOT_CHOSEN = "what its separable forms save does less damage elsewhere"
    NOT_FASTER_WHOLE = "with it replaced the whole network did not measure faster"
    REPLACEMENT_FAILS = "the network does not run with it replaced"


Policy = Literal["normal", "linear", "bottleneck", "inverted"]
"""How many middle channels: min(in, out), (in + out) / 2, max(in, out) / 4 or 4 * min(in, out)."""

GroupRounding = Literal["auto", "uneven", "divisor", "padded"]
"""What becomes of groups that do not divide the channels; see `SchemeOptions.group_rounding`."""


@dataclass(frozen=True, slots=True)
class SchemeOptions:
    """Hyper-parameters of the schemes; each scheme reads those that it has.

    Attributes:
        terms: Parallel depthwise-separable pairs T, at least 1.
        rank_ratio: Middle channels of a spatial or low-rank pair as a share of the full rank, in (0, 1].
        factors: Convolutions in an optimized-separable chain, N, at least 1; None takes the N with the fewest weights.
        overlap: Overlap coefficient gamma, above 0: how many paths lead from each input to each output channel. Below 1
            the outputs no longer see every input channel.
        policy: How many middle channels an optimized-separable chain has.
        middle_channels: The middle channels themselves, N - 1 of them or one for all; empty takes the policy.
        kernel_position: Which factor has the KxK kernel (the Kx1 one, the 1xK one following), from 1; None is N // 2,
            and in a chain of two with KxK whichever comes nearer to the trained kernel.
        kernel_sizes: (Kh, Kw) of each factor; empty leaves it to `kernel_position`.
        groups: Groups of each factor, None where they are to be found; empty finds all. For the grouped scheme one
            number, 4 if empty.
        min_group_channels: Fewest channels that a group of an optimized-separable or grouped convolution may read or
            return. Grouped int8 kernels are slow below 8; 16 or 32 suit vector units better.
        group_rounding: 'uneven' keeps the best number of groups, some of which then have one channel more than
            others; 'divisor' takes the best number that divides the channels, one plain grouped convolution;
            'auto' takes 'divisor' where it costs at most a tenth more weights, for the grouped scheme never; 'padded'
            fills groups up with zeros, as the authors of the method do.

    Raises:
        UsageError: if a value is outside its range.
    """

    terms: int = 2
    rank_ratio: float = 0.25
    factors: int | None = 2
    overlap: float = 1.0
    policy: Policy = "normal"
    middle_channels: tuple[int, ...] = ()
    kernel_position: int | None = None
    kernel_sizes: tuple[Size, ...] = ()
    groups: tuple[int | None, ...] = ()
    min_group_channels: int = 1
    group_rounding: GroupRounding = "auto"

    def __post_init__(self) -> None:
        if self.terms < 1:
            raise UsageError(f"--terms must be at least 1, got {self.terms}")
        if not 0 < self.rank_ratio <= 1:
            raise UsageError(f"--rank-ratio must be above 0 and at most 1, got {self.rank_ratio}")
        if self.factors is not None and not 1 <= self.factors <= MAX_FACTORS:
            raise UsageError(f"--factors must be 1 to {MAX_FACTORS} or 'optimal', got {self.factors}")
        if not 0 < self.overlap < math.inf:
            raise UsageError(f"--overlap must be a number above 0, got {self.overlap}")
        if self.policy not in get_args(Policy) or self.group_rounding not in get_args(GroupRounding):
            raise UsageError(f"there is no policy '{self.policy}' or group rounding '{self.group_rounding}'")
        counts = (*self.middle_channels, *(g for g in self.groups if g is not None), *sum(self.kernel_sizes, ()))
        if min((*counts, self.min_group_channels, self.kernel_position or 1)) < 1:
            raise UsageError("middle channels, kernel sizes, groups and --min-group-channels must be at least 1")


MAX_FACTORS = 12
"""Most factors in a chain: log(C * K * K) of a layer with 16,000 channels at 3x3."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A separable form for one convolution.

    Attributes:
        scheme: Name in the scheme registry.
        form: The chains that compute it.
        macs: Multiply-accumulates of all its calls for one image.
        params: Weights and biases.
        lowering: How it is written down in the target's file, lowerings in order; None takes what suits each file.
    """

    scheme: str
    form: ChainSum
    macs: int
    params: int
    lowering: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class Replaced:
    """The convolution becomes `candidate`."""

    candidate: Candidate
    kind: Literal["replaced"] = "replaced"


@dataclass(frozen=True, slots=True)
class Kept:
    """The convolution stays.

    Attributes:
        reason: Why.
        detail: The numbers behind the reason, or an empty string.
    """

    reason: Reason
    detail: str = ""
    kind: Literal["kept"] = "kept"


@dataclass(frozen=True, slots=True)
class Decision:
    """What becomes of one convolution.

    Attributes:
        name: Its name in the trace.
        macs: Its multiply-accumulates now, all calls, one image.
        params: Its weights and biases now.
        outcome: Replaced or Kept.
    """

    name: str
    macs: int
    params: int
    outcome: Replaced | Kept


def lowered_for(target: str, precision: Precision) -> str:
    """What lowerings were chosen for, as `Plan.lowered_for` has it.

    >>> lowered_for("ort", Precision.INT8)
    'ort int8'
    """
    return f"{target} {precision.value}"


@dataclass(frozen=True, slots=True)
class Plan:
    """One decision for each convolution of the network, in the order of the trace.

    Attributes:
        scheme: The scheme that was asked for.
        options: Its hyper-parameters.
        decisions: One per convolution; names are unique.
        lowered_for: Target and precision that the candidates' lowerings were chosen for (`lowered_for`); empty if none
            were.

    Raises:
        UsageError: if a convolution is named twice.
    """

    scheme: str
    options: SchemeOptions
    decisions: tuple[Decision, ...]
    lowered_for: str = ""
    format_version: Literal[1] = field(default=1)

    def __post_init__(self) -> None:
        twice = [name for name, count in Counter(d.name for d in self.decisions).items() if count > 1]
        if twice:
            raise UsageError(f"the plan decides twice about {', '.join(sorted(twice))}")

    @property
    def replaced(self) -> dict[str, Candidate]:
        """Name -> candidate for every convolution that is replaced, in order."""
        return {d.name: d.outcome.candidate for d in self.decisions if isinstance(d.outcome, Replaced)}

    @property
    def kept(self) -> dict[str, Kept]:
        """Name -> reason for every convolution that stays, in order."""
        return {d.name: d.outcome for d in self.decisions if isinstance(d.outcome, Kept)}

    def macs_of(self, trace: Trace) -> int:
        """Multiply-accumulates of the whole network as the plan makes it, one image."""
        return trace.total_macs - sum(trace.site(name).macs - c.macs for name, c in self.replaced.items())

    def with_outcome(self, name: str, outcome: Replaced | Kept) -> Plan:
        """The same plan with another outcome for the convolution `name`."""
        return replace(
            self,
            decisions=tuple(
                Decision(d.name, d.macs, d.params, outcome) if d.name == name else d for d in self.decisions
            ),
        )
