"""depthwise: one KxK convolution with as many groups as channels; for ablation only, it fuses no channels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sepdeploy.core.chain import ChainSum
from sepdeploy.schemes.grouped import diagonal_blocks, grouped_form
from sepdeploy.schemes.scheme import refusal_of

if TYPE_CHECKING:
    from torch import Tensor

    from sepdeploy.core.conv import ConvSpec
    from sepdeploy.core.plan import Reason, SchemeOptions
    from sepdeploy.schemes.scheme import FactorWeights

__all__ = ["SCHEME", "Depthwise"]


@dataclass(frozen=True, slots=True)
class Depthwise:
    """One factor with min(I, O) groups; where I and O differ, groups have several channels on the wider side."""

    name: str = "depthwise"
    prefix: str = "dw-"
    summary: str = "depthwise KxK alone: no output sees more than one channel (ablation)"
    complexity: str = "C * K**2"
    option_names: tuple[str, ...] = ()

    def check(self, spec: ConvSpec) -> Reason | None:
        """Refuse 1x1 kernels, which would only scale channels, and what is grouped already."""
        return refusal_of(spec, takes_groups=False)

    def design(self, spec: ConvSpec, options: SchemeOptions) -> ChainSum:  # noqa: ARG002 (part of the protocol)
        """One factor."""
        return grouped_form(spec, min(spec.in_channels, spec.out_channels), pads_groups=False)

    def alternatives(self, spec: ConvSpec, options: SchemeOptions) -> tuple[ChainSum, ...]:  # noqa: ARG002 (protocol)
        """None."""
        return ()

    def factorize(self, weight: Tensor, form: ChainSum, moments: Tensor | None = None) -> FactorWeights:  # noqa: ARG002
        """The kernel's own weights within each group: nothing else is nearer to it."""
        return ((diagonal_blocks(weight, form.terms[0].factors[0]),),)


SCHEME = Depthwise()
