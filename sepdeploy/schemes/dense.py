"""dense: the convolution as it is, the reference that every other scheme has to beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sepdeploy.core.chain import Chain, ChainSum
from sepdeploy.core.plan import Reason

if TYPE_CHECKING:
    from torch import Tensor

    from sepdeploy.core.conv import ConvSpec
    from sepdeploy.core.plan import SchemeOptions
    from sepdeploy.schemes.scheme import FactorWeights

__all__ = ["SCHEME", "Dense"]


@dataclass(frozen=True, slots=True)
class Dense:
    """One factor: the convolution itself."""

    name: str = "dense"
    prefix: str = ""
    summary: str = "the convolution as it is"
    complexity: str = "C**2 * K**2"
    option_names: tuple[str, ...] = ()

    def check(self, spec: ConvSpec) -> Reason | None:  # noqa: ARG002 (part of the protocol)
        """Dense never replaces anything."""
        return Reason.SCHEME_IS_DENSE

    def design(self, spec: ConvSpec, options: SchemeOptions) -> ChainSum:  # noqa: ARG002 (part of the protocol)
        """The convolution as a chain of one factor."""
        return ChainSum((Chain((spec.as_factor(),)),))

    def alternatives(self, spec: ConvSpec, options: SchemeOptions) -> tuple[ChainSum, ...]:  # noqa: ARG002 (protocol)
        """None."""
        return ()

    def factorize(self, weight: Tensor, form: ChainSum, moments: Tensor | None = None) -> FactorWeights:  # noqa: ARG002
        """The kernel itself."""
        return ((weight,),)


SCHEME = Dense()
