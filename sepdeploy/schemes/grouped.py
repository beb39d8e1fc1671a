"""grouped: one KxK convolution whose outputs see only the channels of their group (AlexNet, 2012; ResNeXt, 2017)."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sepdeploy.core.chain import Chain, ChainSum, Factor
from sepdeploy.errors import UsageError
from sepdeploy.schemes.scheme import refusal_of

if TYPE_CHECKING:
    from torch import Tensor

    from sepdeploy.core.conv import ConvSpec
    from sepdeploy.core.plan import Reason, SchemeOptions
    from sepdeploy.schemes.scheme import FactorWeights

__all__ = ["SCHEME", "Grouped", "diagonal_blocks", "grouped_form"]

_DEFAULT_GROUPS = 4


@dataclass(frozen=True, slots=True)
class Grouped:
    """One factor with g groups; without a shuffle no output sees more than one g-th of the channels."""

    name: str = "grouped"
    prefix: str = ""
    summary: str = "grouped KxK: each output sees the channels of its group"
    complexity: str = "C**2 * K**2 / g"
    option_names: tuple[str, ...] = ("groups", "min_group_channels", "group_rounding")

    def check(self, spec: ConvSpec) -> Reason | None:
        """Refuse what is grouped already and what has too few channels."""
        return refusal_of(spec, takes_pointwise=True, takes_groups=False)

    def design(self, spec: ConvSpec, options: SchemeOptions) -> ChainSum:
        """The number in `options.groups`, or 4; fewer where other options or the channels ask for it.

        Raises:
            UsageError: if there are several numbers.
        """
        if len(options.groups) > 1:
            raise UsageError(f"the grouped scheme has one number of groups, got {len(options.groups)}")
        wanted = options.groups[0] if options.groups and options.groups[0] else _DEFAULT_GROUPS
        groups = max(1, min(wanted, min(spec.in_channels, spec.out_channels) // options.min_group_channels))
        if options.group_rounding == "divisor":
            common = math.gcd(spec.in_channels, spec.out_channels)
            groups = max(divisor for divisor in range(1, groups + 1) if common % divisor == 0)
        return grouped_form(spec, groups, pads_groups=options.group_rounding == "padded")

    def alternatives(self, spec: ConvSpec, options: SchemeOptions) -> tuple[ChainSum, ...]:  # noqa: ARG002 (protocol)
        """None."""
        return ()

    def factorize(self, weight: Tensor, form: ChainSum, moments: Tensor | None = None) -> FactorWeights:  # noqa: ARG002
        """The kernel's own weights within each group: nothing else is nearer to it."""
        return ((diagonal_blocks(weight, form.terms[0].factors[0]),),)


def grouped_form(spec: ConvSpec, groups: int, *, pads_groups: bool) -> ChainSum:
    """The convolution with other groups."""
    return ChainSum((Chain((replace(spec.as_factor(), groups=groups, pads_groups=pads_groups),)),))


def diagonal_blocks(weight: Tensor, factor: Factor) -> Tensor:
    """The part of a dense kernel (O, I, Kh, Kw) that a grouped one can hold, (O, in_per_group, Kh, Kw)."""
    import torch

    from sepdeploy.schemes.kernels import input_channels

    columns = input_channels(factor)
    is_inside = columns < factor.in_channels
    rows = torch.arange(factor.out_channels)[:, None]
    return weight[rows, columns.clamp_max(factor.in_channels - 1)] * is_inside[:, :, None, None].to(weight.dtype)


SCHEME = Grouped()
