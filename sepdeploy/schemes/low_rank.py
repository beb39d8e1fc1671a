"""low_rank: a KxK convolution to r channels, then a 1x1 one (Denton et al., 2014; Zhang et al., 2016)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sepdeploy.core.chain import Chain, ChainSum, Factor
from sepdeploy.schemes.scheme import refusal_of, rounded_rank

if TYPE_CHECKING:
    from torch import Tensor

    from sepdeploy.core.conv import ConvSpec
    from sepdeploy.core.plan import Reason, SchemeOptions
    from sepdeploy.schemes.scheme import FactorWeights

__all__ = ["SCHEME", "LowRank"]


@dataclass(frozen=True, slots=True)
class LowRank:
    """KxK to r middle channels per group, then 1x1; the groups of the original are kept in both."""

    name: str = "low_rank"
    prefix: str = ""
    summary: str = "KxK to r middle channels, then pointwise 1x1"
    complexity: str = "C * r * K**2 + C * r"
    option_names: tuple[str, ...] = ("rank_ratio",)

    def check(self, spec: ConvSpec) -> Reason | None:
        """Refuse depthwise kernels and those that read too few channels; 1x1 kernels and linear layers are welcome."""
        return refusal_of(spec, takes_pointwise=True)

    def design(self, spec: ConvSpec, options: SchemeOptions) -> ChainSum:
        """Rank r = rank_ratio * min(I * Kh * Kw, O) per group, rounded to a multiple of 8 below the full rank."""
        taps = spec.kernel_size[0] * spec.kernel_size[1]
        full = min(spec.in_channels // spec.groups * taps, spec.out_channels // spec.groups)
        middle = rounded_rank(options.rank_ratio, full) * spec.groups
        first = replace(spec.as_factor(), out_channels=middle)
        return ChainSum((Chain((first, Factor(middle, spec.out_channels, (1, 1), groups=spec.groups))),))

    def alternatives(self, spec: ConvSpec, options: SchemeOptions) -> tuple[ChainSum, ...]:  # noqa: ARG002 (protocol)
        """None."""
        return ()

    def factorize(self, weight: Tensor, form: ChainSum, moments: Tensor | None = None) -> FactorWeights:
        """Truncated SVD of the (I * Kh * Kw, O) matrix of each group."""
        from sepdeploy.schemes.low_rank_svd import factor_matrices

        first, _ = form.terms[0].factors
        groups, rank = first.groups, first.out_channels // first.groups
        matrices = weight.reshape(groups, len(weight) // groups, -1).mT
        left, right = factor_matrices(matrices, rank, moments)
        reduce = left.mT.reshape(first.weight_shape)
        expand = right.mT.reshape(len(weight), rank, 1, 1)
        return ((reduce.contiguous(), expand.contiguous()),)


SCHEME = LowRank()
