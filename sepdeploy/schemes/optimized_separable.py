"""optimized_separable: N grouped convolutions with channel shuffles, one of them KxK, all balanced in cost.

"Optimized Separable Convolution: Yet Another Efficient Convolution Operator", Algorithm 1.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sepdeploy.core.chain import ChainSum
from sepdeploy.schemes.design import DESIGN_OPTIONS, assemble_chain, design_chain
from sepdeploy.schemes.scheme import refusal_of

if TYPE_CHECKING:
    from torch import Tensor

    from sepdeploy.core.conv import ConvSpec
    from sepdeploy.core.plan import Reason, SchemeOptions
    from sepdeploy.schemes.scheme import FactorWeights

__all__ = ["SCHEME", "OptimizedSeparable"]


@dataclass(frozen=True, slots=True)
class OptimizedSeparable:
    """N grouped factors, one of them KxK, whose groups Algorithm 1 chooses."""

    name: str = "optimized_separable"
    prefix: str = "o-"
    summary: str = "N grouped convolutions with shuffles, one of them KxK, balanced in cost"
    complexity: str = "2 * C**1.5 * K"
    option_names: tuple[str, ...] = DESIGN_OPTIONS

    def check(self, spec: ConvSpec) -> Reason | None:
        """Refuse what is grouped already or has too few channels; 1x1 kernels and linear layers are welcome."""
        return refusal_of(spec, takes_pointwise=True, takes_groups=False)

    def design(self, spec: ConvSpec, options: SchemeOptions) -> ChainSum:
        """Algorithm 1; by default the kernel is in factor floor(N / 2)."""
        design = design_chain(spec.in_channels, spec.out_channels, spec.kernel_size, options)
        return ChainSum((assemble_chain(design, spec),))

    def alternatives(self, spec: ConvSpec, options: SchemeOptions) -> tuple[ChainSum, ...]:
        """For two factors the kernel in the second one, unless `options` fix its place."""
        is_open = options.kernel_position is None and not options.kernel_sizes
        if spec.is_pointwise or options.factors != 2 or not is_open:
            return ()
        return (self.design(spec, replace(options, kernel_position=2)),)

    def factorize(self, weight: Tensor, form: ChainSum, moments: Tensor | None = None) -> FactorWeights:
        """Block projection, exact for two factors; recursive for more, then alternating least squares."""
        from sepdeploy.schemes.block_projection import factorize_chain

        return (factorize_chain(weight, form.terms[0], moments),)


SCHEME = OptimizedSeparable()
