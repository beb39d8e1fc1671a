"""What every scheme makes of one convolution: table 1 of "Optimized Separable Convolution", computed."""

from __future__ import annotations

from dataclasses import replace

from sepdeploy.core.conv import ConvSpec
from sepdeploy.core.describe import describe_form
from sepdeploy.core.design import FROM_SCRATCH, SchemeCost
from sepdeploy.core.plan import Reason, SchemeOptions
from sepdeploy.core.receptive_field import receptive_field
from sepdeploy.errors import UsageError
from sepdeploy.schemes.scheme import SCHEMES, Scheme, find_scheme

__all__ = ["scheme_costs"]

_OPTIMAL_COMPLEXITY = "e * C * log(C * K**2)"


def scheme_costs(channels: int, kernel_size: int, input_size: int) -> tuple[SchemeCost, ...]:
    """Weights, multiply-accumulates and receptive field of every scheme for a dense convolution that keeps the size.

    Args:
        channels: Input and output channels C.
        kernel_size: K.
        input_size: Height and width of the input in pixels.

    Returns:
        One row per scheme with its hyper-parameters for networks from scratch, and one for optimized separable with the
        best number of factors.

    Raises:
        UsageError: if a size is below 1.
    """
    if min(channels, kernel_size, input_size) < 1:
        raise UsageError(f"channels, kernel and input must be at least 1, got {channels}, {kernel_size}, {input_size}")
    before, after = (kernel_size - 1) // 2, kernel_size // 2
    spec = ConvSpec(channels, channels, (kernel_size, kernel_size), padding=(before, after, before, after))
    rows = [_cost(find_scheme(name), spec, FROM_SCRATCH, input_size) for name in SCHEMES]
    optimized = find_scheme("optimized_separable")
    best = _cost(optimized, spec, replace(FROM_SCRATCH, factors=None), input_size)
    return (*rows, replace(best, name=f"{best.name}, optimal N", complexity=_OPTIMAL_COMPLEXITY))


def _cost(scheme: Scheme, spec: ConvSpec, options: SchemeOptions, input_size: int) -> SchemeCost:
    row = SchemeCost(scheme.name, scheme.prefix, scheme.summary, scheme.complexity, scheme.option_names)
    refusal = scheme.check(spec)
    if refusal not in (None, Reason.SCHEME_IS_DENSE):
        return replace(row, refusal=refusal)
    form, dense = scheme.design(spec, options), spec.as_factor()
    return replace(
        row,
        form=describe_form(form),
        params=form.params,
        macs=form.macs((input_size, input_size)),
        ratio=form.params / dense.params,
        keeps_receptive_field=receptive_field(form).covers(receptive_field(dense)),
    )
