"""spatial_optimized: optimized separable with the kernel split into Kx1 and 1xK (the spatial branch of Algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sepdeploy.core.chain import ChainSum
from sepdeploy.schemes.design import DESIGN_OPTIONS, assemble_chain, design_chain
from sepdeploy.schemes.scheme import refusal_of

if TYPE_CHECKING:
    from torch import Tensor

    from sepdeploy.core.conv import ConvSpec
    from sepdeploy.core.plan import Reason, SchemeOptions
    from sepdeploy.schemes.scheme import FactorWeights

__all__ = ["SCHEME", "SpatialOptimized"]


@dataclass(frozen=True, slots=True)
class SpatialOptimized:
    """N grouped factors, two neighbours of them Kx1 and 1xK, whose groups Algorithm 1 chooses."""

    name: str = "spatial_optimized"
    prefix: str = "so-"
    summary: str = "N grouped convolutions with shuffles, two of them Kx1 and 1xK, balanced in cost"
    complexity: str = "2 * C**1.5 * K"
    option_names: tuple[str, ...] = DESIGN_OPTIONS

    def check(self, spec: ConvSpec) -> Reason | None:
        """Refuse kernels without two spatial dimensions, and what is grouped already or has too few channels."""
        return refusal_of(spec, takes_rows=False, takes_groups=False)

    def design(self, spec: ConvSpec, options: SchemeOptions) -> ChainSum:
        """Algorithm 1 with Kx1 in factor floor(N / 2) and 1xK in the next."""
        design = design_chain(spec.in_channels, spec.out_channels, spec.kernel_size, options, is_spatial=True)
        return ChainSum((assemble_chain(design, spec),))

    def alternatives(self, spec: ConvSpec, options: SchemeOptions) -> tuple[ChainSum, ...]:  # noqa: ARG002 (protocol)
        """None."""
        return ()

    def factorize(self, weight: Tensor, form: ChainSum, moments: Tensor | None = None) -> FactorWeights:
        """Block projection, exact for two factors; recursive for more, then alternating least squares."""
        from sepdeploy.schemes.block_projection import factorize_chain

        return (factorize_chain(weight, form.terms[0], moments),)


SCHEME = SpatialOptimized()
