"""The plan: for each convolution of the network, what replaces it or why it stays."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal

from sepdeploy.core.chain import ChainSum
from sepdeploy.errors import UsageError

__all__ = ["Candidate", "Decision", "Kept", "Plan", "Reason", "Replaced", "SchemeOptions"]


class Reason(Enum):
    """Why a convolution stays as it is; the value is the sentence that the user reads."""

    NOT_CALLED = "the forward pass never runs it"
    NOT_CONV2D = "only 2-D convolutions have separable forms here"
    TRANSPOSED = "transposed convolutions are not supported yet"
    FUNCTIONAL = "it is a functional call, not an nn.Conv2d module, so it cannot be swapped"
    CUSTOM_FORWARD = "its class overrides nn.Conv2d's computation"
    PARAMETRIZED = "its weight is recomputed on each call (parametrization or weight norm)"
    HAS_HOOKS = "it carries forward hooks, which a replacement would lose"
    SHARED_WEIGHT = "its weight is shared with another module"
    QUANTIZED_OR_NOT_FLOAT = "its weight is not a floating-point tensor"
    NOT_FINITE = "its weight has NaN or infinite values"
    POINTWISE = "a 1x1 kernel has no spatial extent to separate"
    DEPTHWISE = "it is depthwise already"
    ONE_DIMENSIONAL_KERNEL = "a kernel of one row or one column has nothing to separate into two"
    FEW_CHANNELS = "it reads fewer than 4 channels per group, too few for a separable form to pay"
    NOT_CHEAPER = "the separable form needs at least as many multiply-accumulates"
    SCHEME_IS_DENSE = "the dense scheme replaces nothing"
    EXCEEDS_MAX_DROP = "replacing it breaks --max-drop"
    NOT_TRIED = "the guard ended before its turn: the convolutions before it used up --max-drop"
    REPLACEMENT_FAILS = "the network does not run with it replaced"


@dataclass(frozen=True, slots=True)
class SchemeOptions:
    """Hyper-parameters of the schemes; each scheme reads those that it has.

    Attributes:
        terms: Parallel depthwise-separable pairs T, at least 1.
        rank_ratio: Middle channels of a spatial pair as a share of the full rank, in (0, 1].

    Raises:
        UsageError: if a value is outside its range.
    """

    terms: int = 2
    rank_ratio: float = 0.25

    def __post_init__(self) -> None:
        if self.terms < 1:
            raise UsageError(f"--terms must be at least 1, got {self.terms}")
        if not 0 < self.rank_ratio <= 1:
            raise UsageError(f"--rank-ratio must be above 0 and at most 1, got {self.rank_ratio}")


@dataclass(frozen=True, slots=True)
class Candidate:
    """A separable form for one convolution.

    Attributes:
        scheme: Name in the scheme registry.
        form: The chains that compute it.
        macs: Multiply-accumulates of all its calls for one image.
        params: Weights and biases.
    """

    scheme: str
    form: ChainSum
    macs: int
    params: int


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


@dataclass(frozen=True, slots=True)
class Plan:
    """One decision for each convolution of the network, in the order of the trace.

    Attributes:
        scheme: The scheme that was asked for.
        options: Its hyper-parameters.
        decisions: One per convolution; names are unique.

    Raises:
        UsageError: if a convolution is named twice.
    """

    scheme: str
    options: SchemeOptions
    decisions: tuple[Decision, ...]
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

    def with_outcome(self, name: str, outcome: Replaced | Kept) -> Plan:
        """The same plan with another outcome for the convolution `name`."""
        return Plan(
            scheme=self.scheme,
            options=self.options,
            decisions=tuple(
                Decision(d.name, d.macs, d.params, outcome) if d.name == name else d for d in self.decisions
            ),
        )
