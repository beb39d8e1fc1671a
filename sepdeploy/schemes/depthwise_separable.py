"""depthwise_separable: a KxK depthwise convolution, then a 1x1 pointwise one; several such pairs may be added up.

The sum of T pairs is the network decoupling of Guo et al. (2018); T = 1 is the block of Xception and MobileNet.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sepdeploy.core.chain import Chain, ChainSum, Factor
from sepdeploy.schemes.scheme import refusal_of

if TYPE_CHECKING:
    from torch import Tensor

    from sepdeploy.core.conv import ConvSpec
    from sepdeploy.core.plan import Reason, SchemeOptions
    from sepdeploy.schemes.scheme import FactorWeights

__all__ = ["SCHEME", "DepthwiseSeparable"]


@dataclass(frozen=True, slots=True)
class DepthwiseSeparable:
    """A sum of T pairs depthwise KxK, pointwise 1x1; the pointwise one keeps the groups of the original."""

    name: str = "depthwise_separable"
    prefix: str = "d-"
    summary: str = "sum of T pairs: depthwise KxK, then pointwise 1x1"
    complexity: str = "T * C * (C + K**2)"
    option_names: tuple[str, ...] = ("terms",)

    def check(self, spec: ConvSpec) -> Reason | None:
        """Refuse what has no spatial extent, is depthwise already, or reads too few channels."""
        return refusal_of(spec)

    def design(self, spec: ConvSpec, options: SchemeOptions) -> ChainSum:
        """T equal pairs; T is capped at the full rank min(Kh * Kw, O / groups), where the form is exact."""
        taps = spec.kernel_size[0] * spec.kernel_size[1]
        terms = min(options.terms, taps, spec.out_channels // spec.groups)
        depthwise = Factor(
            in_channels=spec.in_channels,
            out_channels=spec.in_channels,
            kernel_size=spec.kernel_size,
            stride=spec.stride,
            padding=spec.zero_padding,
            dilation=spec.dilation,
            groups=spec.in_channels,
        )
        pointwise = Factor(
            in_channels=spec.in_channels, out_channels=spec.out_channels, kernel_size=(1, 1), groups=spec.groups
        )
        return ChainSum((Chain((depthwise, pointwise)),) * terms)

    def alternatives(self, spec: ConvSpec, options: SchemeOptions) -> tuple[ChainSum, ...]:  # noqa: ARG002 (protocol)
        """None."""
        return ()

    def factorize(self, weight: Tensor, form: ChainSum, moments: Tensor | None = None) -> FactorWeights:
        """Truncated SVD per input channel of its (Kh * Kw, O / groups) slice of the kernel.

        Exact if T reaches the rank of every slice; otherwise the best T terms, since the channels are independent.
        """
        from sepdeploy.schemes.low_rank_svd import factor_matrices

        terms = len(form.terms)
        groups = form.terms[0].factors[1].groups
        out_channels, in_per_group, height, width = weight.shape
        out_per_group = out_channels // groups
        # (groups, out, in, taps) -> one (taps, out) matrix per input channel
        slices = weight.reshape(groups, out_per_group, in_per_group, height * width).permute(0, 2, 3, 1)
        left, right = factor_matrices(slices.flatten(0, 1), terms, moments)
        factors = []
        for term in range(terms):
            depthwise = left[:, :, term].reshape(groups * in_per_group, 1, height, width)
            pointwise = right[:, term].reshape(groups, in_per_group, out_per_group).mT
            pointwise = pointwise.reshape(out_channels, in_per_group)
            factors.append((depthwise.contiguous(), pointwise[:, :, None, None].contiguous()))
        return tuple(factors)


SCHEME = DepthwiseSeparable()
