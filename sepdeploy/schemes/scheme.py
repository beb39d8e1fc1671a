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

__all__ = ["MIN_CHANNELS_PER_GROUP", "SCHEMES", "FactorWeights", "Scheme", "find_scheme"]

FactorWeights = tuple[tuple["Tensor", ...], ...]
"""One weight (out, in / groups, Kh, Kw) per factor, per term of a `ChainSum`."""

MIN_CHANNELS_PER_GROUP = 4
"""Below this a depthwise stage would cost as much as what it replaces; it also leaves image stems dense."""


class Scheme(Protocol):
    """One way to write a convolution as a chain of cheaper ones."""

    @property
    def name(self) -> str:
        """Key in the registry and on the command line."""

    @property
    def summary(self) -> str:
        """What it is, in one line."""

    def check(self, spec: ConvSpec) -> Reason | None:
        """Why the scheme cannot replace a convolution of this geometry; None if it can."""

    def design(self, spec: ConvSpec, options: SchemeOptions) -> ChainSum:
        """The chains that replace a convolution for which `check` gave None.

        Padding stays in the chains only for padding_mode 'zeros'; other modes are applied before the chains.
        """

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


def _depthwise_separable() -> Scheme:
    from sepdeploy.schemes.depthwise_separable import SCHEME

    return SCHEME


def _spatial_separable() -> Scheme:
    from sepdeploy.schemes.spatial_separable import SCHEME

    return SCHEME


SCHEMES: Mapping[str, Callable[[], Scheme]] = MappingProxyType(
    {
        "dense": _dense,
        "depthwise_separable": _depthwise_separable,
        "spatial_separable": _spatial_separable,
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
