"""spatial_separable: a Kx1 convolution to r middle channels, then a 1xK one (Jaderberg et al., 2014, scheme 2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sepdeploy.core.chain import Chain, ChainSum, Factor
from sepdeploy.schemes.scheme import refusal_of, rounded_rank

if TYPE_CHECKING:
    from torch import Tensor

    from sepdeploy.core.conv import ConvSpec
    from sepdeploy.core.plan import Reason, SchemeOptions
    from sepdeploy.schemes.scheme import FactorWeights

__all__ = ["SCHEME", "SpatialSeparable"]


@dataclass(frozen=True, slots=True)
class SpatialSeparable:
    """Kx1 to r middle channels per group, then 1xK; the groups of the original are kept in both."""

    name: str = "spatial_separable"
    prefix: str = "s-"
    summary: str = "Kx1 to r middle channels, then 1xK"
    complexity: str = "2 * C * r * K"
    option_names: tuple[str, ...] = ("rank_ratio",)

    def check(self, spec: ConvSpec) -> Reason | None:
        """Refuse kernels without two spatial dimensions, depthwise ones and those that read too few channels."""
        return refusal_of(spec, takes_rows=False)

    def design(self, spec: ConvSpec, options: SchemeOptions) -> ChainSum:
        """Rank r = rank_ratio * min(I * Kh, O * Kw) per group, rounded to a multiple of 8 below the full rank."""
        in_per_group, out_per_group = spec.in_channels // spec.groups, spec.out_channels // spec.groups
        full = min(in_per_group * spec.kernel_size[0], out_per_group * spec.kernel_size[1])
        rank = rounded_rank(options.rank_ratio, full)
        top, bottom, left, right = spec.zero_padding
        vertical = Factor(
            in_channels=spec.in_channels,
            out_channels=rank * spec.groups,
            kernel_size=(spec.kernel_size[0], 1),
            stride=(spec.stride[0], 1),
            padding=(top, bottom, 0, 0),
            dilation=(spec.dilation[0], 1),
            groups=spec.groups,
        )
        horizontal = Factor(
            in_channels=rank * spec.groups,
            out_channels=spec.out_channels,
            kernel_size=(1, spec.kernel_size[1]),
            stride=(1, spec.stride[1]),
            padding=(0, 0, left, right),
            dilation=(1, spec.dilation[1]),
            groups=spec.groups,
        )
        return ChainSum((Chain((vertical, horizontal)),))

    def alternatives(self, spec: ConvSpec, options: SchemeOptions) -> tuple[ChainSum, ...]:  # noqa: ARG002 (protocol)
        """None."""
        return ()

    def factorize(self, weight: Tensor, form: ChainSum, moments: Tensor | None = None) -> FactorWeights:
        """Truncated SVD of the (I * Kh, O * Kw) matrix of each group.

        With moments the columns of the window are taken as uncorrelated: an approximation, exact for Kw = 1.
        """
        from sepdeploy.schemes.low_rank_svd import factor_matrices

        vertical, _ = form.terms[0].factors
        groups, rank = vertical.groups, vertical.out_channels // vertical.groups
        out_channels, in_per_group, height, width = weight.shape
        out_per_group = out_channels // groups
        matrices = weight.reshape(groups, out_per_group, in_per_group, height, width).permute(0, 2, 3, 1, 4)
        left, right = factor_matrices(
            matrices.reshape(groups, in_per_group * height, out_per_group * width), rank, moments
        )
        first = left.mT.reshape(groups * rank, in_per_group, height, 1)
        second = right.reshape(groups, rank, out_per_group, width).transpose(1, 2).reshape(out_channels, rank, 1, width)
        return ((first.contiguous(), second.contiguous()),)


SCHEME = SpatialSeparable()
