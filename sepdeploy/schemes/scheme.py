"""What a scheme must offer, and the registry of all schemes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol

from sepdeploy.errors import UsageError

if TYPE_CHECKING:
    from torch import Tensor

    from sepdeploy.core.chain import ChainSum
    from sepdeploy.core.conv import ConvSpec
    from sepdeploy.core.plan import Reason, SchemeOptions

__all__ = ["MIN_CHANNELS_PER_GROUP", "SCHEMES", "FactorWeights", "Scheme", "find_scheme", "refusal_of", "rounded_rank"]

FactorWeights = tuple[tuple["Tensor", ...], ...]
"""One weight (out, in / groups, Kh, Kw) per factor, per term of a `ChainSum`."""

MIN_CHANNELS_PER_GROUP = 4
"""Below this a depthwise stage would cost as much as what it replaces; it also leaves image stems dense."""


def refusal_of(
    spec: ConvSpec, *, takes_pointwise: bool = False, takes_rows: bool = True, takes_groups: bool = True
) -> Reason | None:
    """Why a convolution has the wrong geometry for a scheme; None if it has not.

    Args:
        spec: The convolution; depthwise ones and those that read few channels suit no scheme.
        takes_pointwise: Whether 1x1 kernels do.
        takes_rows: Whether kernels of one row or one column do.
        takes_groups: Whether convolutions that are grouped already do.
    """
    from sepdeploy.core.plan import Reason

    if spec.is_pointwise and not takes_pointwise:
        return Reason.POINTWISE
    if spec.is_depthwise:
        return Reason.DEPTHWISE
    if 1 in spec.kernel_size and not takes_rows:
        return Reason.ONE_DIMENSIONAL_KERNEL
    if spec.groups > 1 and not takes_groups:
        return Reason.GROUPED
    return Reason.FEW_CHANNELS if spec.in_channels // spec.groups < MIN_CHANNELS_PER_GROUP else None


_RANK_MULTIPLE = 8
"""Middle channels are rounded to this: kernels work on blocks of channels and waste what does not fill one."""


def rounded_rank(rank_ratio: float, full: int) -> int:
    """Middle channels: a share of the full rank, at least 1, rounded to a multiple of 8 below the full rank.

    >>> rounded_rank(0.25, 192), rounded_rank(0.1, 40), rounded_rank(1.0, 36)
    (48, 4, 36)
    """
    rank = max(1, round(rank_ratio * full))
    if _RANK_MULTIPLE <= rank < full:
        rank = min(full, round(rank / _RANK_MULTIPLE) * _RANK_MULTIPLE)
    return rank


class Scheme(Protocol):
    """One way to write a convolution as a chain of cheaper ones."""

    @property
    def name(self) -> str:
        """Key in the registry and on the command line."""

    @property
    def prefix(self) -> str:
        """What the literature puts before a network's name, such as 'o-'; empty if nothing."""

    @property
    def summary(self) -> str:
        """What it is, in one line."""

    @property
    def complexity(self) -> str:
        """Weights for C input and output channels and a K x K kernel, as a formula that Python can evaluate.

        Further names: T (terms), r (middle channels), g (groups), e and log. Times H * W it counts MACs ("Optimized
        Separable Convolution", table 1).
        """

    @property
    def option_names(self) -> tuple[str, ...]:
        """The fields of `SchemeOptions` that it reads."""

    def check(self, spec: ConvSpec) -> Reason | None:
        """Why the scheme cannot replace a convolution of this geometry; None if it can."""

    def design(self, spec: ConvSpec, options: SchemeOptions) -> ChainSum:
        """The chains that replace a convolution for which `check` gave None.

        Padding stays in the chains only for padding_mode 'zeros'; other modes are applied before the chains.
        """

    def alternatives(self, spec: ConvSpec, options: SchemeOptions) -> tuple[ChainSum, ...]:
        """Further forms that `options` leave open; the planner takes the one nearest to the trained kernel."""

    def factorize(self, weight: Tensor, form: ChainSum, moments: Tensor | None = None) -> FactorWeights:
        """Closed-form weights: the best approximation of the trained kernel.

        Args:
            weight: The dense kernel, (O, I / groups, Kh, Kw).
            form: What `design` returned.
            moments: Second moments of the first factor's input patches, (G, n, n) with G its groups and
                n = in / G * kh * kw; the error is then measured on such inputs. None: Frobenius norm of the kernel.

        Returns:
            Weights per term and factor, in the dtype of `weight`.
        """


def _dense() -> Scheme:
    from sepdeploy.schemes.dense import SCHEME

    return SCHEME


def _depthwise() -> Scheme:
    from sepdeploy.schemes.depthwise import SCHEME

    return SCHEME


def _grouped() -> Scheme:
    from sepdeploy.schemes.grouped import SCHEME

    return SCHEME


def _depthwise_separable() -> Scheme:
    from sepdeploy.schemes.depthwise_separable import SCHEME

    return SCHEME


def _spatial_separable() -> Scheme:
    from sepdeploy.schemes.spatial_separable import SCHEME

    return SCHEME


def _low_rank() -> Scheme:
    from sepdeploy.schemes.low_rank import SCHEME

    return SCHEME


def _optimized_separable() -> Scheme:
    from sepdeploy.schemes.optimized_separable import SCHEME

    return SCHEME


def _spatial_optimized() -> Scheme:
    from sepdeploy.schemes.spatial_optimized import SCHEME

    return SCHEME


SCHEMES: Mapping[str, Callable[[], Scheme]] = MappingProxyType(
    {
        "dense": _dense,
        "depthwise": _depthwise,
        "grouped": _grouped,
        "depthwise_separable": _depthwise_separable,
        "spatial_separable": _spatial_separable,
        "low_rank": _low_rank,
        "optimized_separable": _optimized_separable,
        "spatial_optimized": _spatial_optimized,
    }
)


def find_scheme(name: str) -> Scheme:
    """The scheme called `name`.

    Raises:
        UsageError: if there is none; the message lists all.

    >>> find_scheme("depthwise_separable").name
    'depthwise_separable'
    """
    if name not in SCHEMES:
        raise UsageError(f"there is no scheme '{name}'; choose one of {', '.join(SCHEMES)}")
    return SCHEMES[name]()
