"""The forms that are worth weighing for each layer: every scheme over a grid of hyper-parameters.

A form is dominated, and left out before anything is measured, if another of the same scheme and structure is no worse
in anything that could matter on any target: multiply-accumulates, weights, activations, the width of the narrowest
group (kernels waste what does not fill a vector) and the whitened error. Forms of different structure cannot be
compared without measuring them. If more remain than are worth measuring, the forms of each scheme are thinned.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from types import MappingProxyType
from typing import NamedTuple

from torch import nn

from sepdeploy.core.chain import ChainSum, Factor
from sepdeploy.core.conv import ConvSite, Trace
from sepdeploy.core.plan import Candidate, Kept, Reason, SchemeOptions
from sepdeploy.errors import UsageError
from sepdeploy.planning.candidates import find_candidate
from sepdeploy.schemes.module import layer_kernel
from sepdeploy.schemes.scheme import SCHEMES, Scheme, find_scheme
from sepdeploy.transfer.isolated import whitened_errors
from sepdeploy.transfer.layer import Batches

__all__ = ["GRID", "MAX_FORMS", "Form", "LayerForms", "TargetLowerings", "propose_choices"]

TargetLowerings = Callable[[ChainSum], tuple[tuple[str, ...], ...]]
"""The ways to write a form down that are worth pricing on the target: sequences of lowerings, maybe an empty one."""

MAX_FORMS = 18
"""Forms of one layer that are worth measuring."""

_NESTED = ("spatial_separable", "low_rank")
"""Schemes whose every dearer form errs less (Eckart-Young): none can dominate another."""

_WIDE_GROUP = 16
"""Channels per group beyond which wider groups do not make kernels faster."""

_RATIOS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.35, 0.5, 0.7)
_OVERLAPS = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_DESIGNS = (
    *(
        SchemeOptions(overlap=overlap, min_group_channels=least, group_rounding="divisor")
        for least in (1, 8, 16)
        for overlap in _OVERLAPS
    ),
    *(SchemeOptions(overlap=overlap) for overlap in (1.0, 2.0)),  # groups of uneven size, where they save much
)

GRID: Mapping[str, tuple[SchemeOptions, ...]] = MappingProxyType(
    {
        "depthwise_separable": tuple(SchemeOptions(terms=terms) for terms in range(1, 5)),
        "spatial_separable": tuple(SchemeOptions(rank_ratio=ratio) for ratio in _RATIOS),
        "low_rank": tuple(SchemeOptions(rank_ratio=ratio) for ratio in _RATIOS),
        "grouped": tuple(SchemeOptions(groups=(groups,)) for groups in (2, 4, 8)),
        "optimized_separable": _DESIGNS,
        "spatial_optimized": _DESIGNS,
    }
)
"""Scheme -> hyper-parameters; dense replaces nothing, and depthwise alone mixes no channels."""


class Form(NamedTuple):
    """One form of a layer.

    Attributes:
        label: For the user, unique within the layer: 'depthwise_separable T=2'.
        candidate: The form.
        lowerings: How it may be written down, each to be priced.
    """

    label: str
    candidate: Candidate
    lowerings: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, slots=True)
class LayerForms:
    """What is weighed for one layer.

    Attributes:
        name: Of the layer.
        forms: Cheapest first within each scheme; empty if nothing can take its place.
        refused: Label of a form, of hyper-parameters or of a scheme -> why it is not weighed.
        kept: Why the layer stays, if it must.
    """

    name: str
    forms: tuple[Form, ...]
    refused: dict[str, str] = field(default_factory=dict)
    kept: Kept | None = None


def propose_choices(
    trace: Trace,
    network: nn.Module,
    target_lowerings: TargetLowerings,
    batches: Batches,
    *,
    schemes: Sequence[str] | None = None,
    grid: Mapping[str, Sequence[SchemeOptions]] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[LayerForms, ...]:
    """All forms of all layers that are worth pricing.

    Args:
        trace: The network's convolutions, and its linear layers if they are asked for.
        network: The trained network in eval mode.
        target_lowerings: What the target can do with a form; none at all refuses it.
        batches: Calibration images, to compare forms on the layers' inputs.
        schemes: Names of the schemes; None takes all of the grid.
        grid: Hyper-parameters of each scheme, in the place of `GRID`.
        progress: Called with (layers done, layers in all).

    Returns:
        One entry per site of the trace, in its order.

    Raises:
        UsageError: if a scheme is not in the grid.
    """
    grid = GRID if grid is None else grid
    names = tuple(grid) if schemes is None else tuple(schemes)
    unknown = [name for name in names if name not in grid or name not in SCHEMES]
    if unknown:
        raise UsageError(f"there is no grid for the scheme '{unknown[0]}'; choose among {', '.join(grid)}")
    layers = []
    for site in trace.sites:
        layers.append(_layer_forms(site, network, target_lowerings, batches, {name: grid[name] for name in names}))
        if progress:
            progress(len(layers), len(trace.sites))
    return tuple(layers)


def _layer_forms(
    site: ConvSite,
    network: nn.Module,
    target_lowerings: TargetLowerings,
    batches: Batches,
    grid: Mapping[str, Sequence[SchemeOptions]],
) -> LayerForms:
    if site.reason is not None:
        return LayerForms(site.name, (), kept=Kept(site.reason))
    refusals: dict[str, Kept] = {}
    forms = _grid_forms(site, network, grid, refusals)
    refused = {label: _sentence(kept) for label, kept in refusals.items()}
    if not forms:
        return LayerForms(site.name, (), refused, _why_kept(refusals))
    same = _repeated(forms)
    refused |= same
    forms = {label: candidate for label, candidate in forms.items() if label not in same}
    lowerings = {label: target_lowerings(candidate.form) for label, candidate in forms.items()}
    refused |= {label: "the target has no way to run it" for label, ways in lowerings.items() if not ways}
    forms = {label: candidate for label, candidate in forms.items() if lowerings[label]}
    dominated = _dominated(forms, site, network, batches)
    forms = {label: candidate for label, candidate in forms.items() if label not in dominated}
    left_out = _thinned_out(forms)
    weighed = (Form(label, candidate, lowerings[label]) for label, candidate in forms.items() if label not in left_out)
    return LayerForms(site.name, tuple(weighed), refused | dominated | left_out)


def _repeated(forms: Mapping[str, Candidate]) -> dict[str, str]:
    """Label -> which one before it is the same: schemes meet at the ends of their grids."""
    first: dict[ChainSum, str] = {}
    return {
        label: f"the same as {first[candidate.form]}"
        for label, candidate in forms.items()
        if first.setdefault(candidate.form, label) != label
    }


def _grid_forms(
    site: ConvSite,
    network: nn.Module,
    grid: Mapping[str, Sequence[SchemeOptions]],
    refusals: dict[str, Kept],
) -> dict[str, Candidate]:
    """Label -> form for all different forms of the grid, by MACs within each scheme; adds what is refused."""
    kernel = layer_kernel(network.get_submodule(site.name))
    forms: dict[str, Candidate] = {}
    for name, points in grid.items():
        scheme = find_scheme(name)
        refusal = scheme.check(site.spec) if site.spec is not None else Reason.NOT_CONV2D
        if refusal is not None:
            refusals[name] = Kept(refusal)
            continue
        found: dict[Candidate, None] = {}  # in order: forms that options agree in come once
        for options in points:
            candidate = find_candidate(site, scheme, options, kernel)
            if isinstance(candidate, Kept):
                refusals[f"{name} {_option_label(scheme, options)}"] = candidate
            else:
                found[candidate] = None
        for candidate in sorted(found, key=lambda candidate: (candidate.macs, candidate.params)):
            label = _form_label(candidate)
            numbered = (label if number == 1 else f"{label} #{number}" for number in count(1))
            forms[next(each for each in numbered if each not in forms)] = candidate
    return forms


def _sentence(kept: Kept) -> str:
    return f"{kept.reason.value} ({kept.detail})" if kept.detail else kept.reason.value


def _why_kept(refusals: Mapping[str, Kept]) -> Kept:
    """The reason that came nearest to a replacement: a form that does not pay, else what most schemes say."""
    by_reason: dict[Reason, Kept] = {}
    for kept in refusals.values():
        by_reason.setdefault(kept.reason, kept)
    if Reason.NOT_CHEAPER in by_reason:
        return by_reason[Reason.NOT_CHEAPER]
    ((reason, _),) = Counter(kept.reason for kept in refusals.values()).most_common(1)
    return by_reason[reason]


def _option_label(scheme: Scheme, options: SchemeOptions) -> str:
    """Hyper-parameters that differ from the defaults: 'terms=6'."""
    default = SchemeOptions()
    values = {name: getattr(options, name) for name in scheme.option_names}
    changed = {name: value for name, value in values.items() if value != getattr(default, name)} or values
    return " ".join(f"{name}={_plain(value)}" for name, value in changed.items())


def _plain(value: object) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _form_label(candidate: Candidate) -> str:
    """Scheme and what tells its forms apart: terms, middle channels or groups, and where the kernel is."""
    first, *others = (term.factors for term in candidate.form.terms)
    groups = ",".join(str(factor.groups) for factor in first)
    if candidate.scheme == "depthwise_separable":
        detail = f"T={1 + len(others)}"
    elif candidate.scheme in ("spatial_separable", "low_rank"):
        detail = f"r={first[0].out_channels}"
    else:
        detail = f"g={groups}"
        middle = sorted({factor.out_channels for factor in first[:-1]})
        if middle and middle != [min(candidate.form.in_channels, candidate.form.out_channels)]:
            detail += f" C={','.join(map(str, middle))}"
        kernel_at = [place for place, factor in enumerate(first, 1) if factor.kernel_size != (1, 1)]
        if kernel_at and kernel_at[0] > 1:
            detail += f" k@{kernel_at[0]}"
    return f"{candidate.scheme} {detail}"


def _structure(candidate: Candidate) -> tuple[object, ...]:
    """What runtimes tell apart: number and kinds of stages. Forms that agree in it differ only in sizes."""
    return candidate.scheme, tuple(
        tuple(_kind(stage) if isinstance(stage, Factor) else stage.kind for stage in term.stages)
        for term in candidate.form.terms
    )


def _kind(factor: Factor) -> tuple[object, ...]:
    is_depthwise = 1 < factor.groups == factor.in_channels
    grouping = "depthwise" if is_depthwise else "grouped" if factor.groups > 1 else "dense"
    return factor.kernel_size, factor.stride, grouping, len(factor.runs)


def _costs(candidate: Candidate, site: ConvSite) -> tuple[float, ...]:
    """All that a form costs, each the less the better."""
    height, width = site.calls[0].input_shape[2:]
    factors = [factor for term in candidate.form.terms for factor in term.factors]
    narrowest = min(min(*factor.in_groups, *factor.out_groups) for factor in factors)
    activations = candidate.form.activation_bytes((height, width))
    return (candidate.macs, candidate.params, activations, -min(narrowest, _WIDE_GROUP))


def _dominated(forms: Mapping[str, Candidate], site: ConvSite, network: nn.Module, batches: Batches) -> dict[str, str]:
    """Label -> reason of the forms that another one dominates; of two that are equal the later one."""
    costs = {label: _costs(candidate, site) for label, candidate in forms.items()}
    structures = {label: _structure(candidate) for label, candidate in forms.items()}

    def is_no_dearer(other: str, label: str) -> bool:
        is_comparable = other != label and structures[other] == structures[label]
        if not is_comparable or forms[label].scheme in _NESTED:
            return False
        return all(a <= b for a, b in zip(costs[other], costs[label], strict=True))

    rivals = {label: [other for other in forms if is_no_dearer(other, label)] for label in forms}
    compared = [label for label in forms if rivals[label] or any(label in others for others in rivals.values())]
    if not compared:
        return {}
    values = whitened_errors(network, site, [forms[label] for label in compared], batches)
    errors = dict(zip(compared, values, strict=True))
    refused: dict[str, str] = {}
    for label in reversed(compared):
        better = [other for other in rivals[label] if other not in refused and errors[other] <= errors[label]]
        if better:
            best = min(better, key=lambda other: errors[other])
            refused[label] = f"{best} costs no more and errs by {errors[best]:.3g}, not {errors[label]:.3g}"
    return refused


def _thinned_out(forms: Mapping[str, Candidate]) -> dict[str, str]:
    """Label -> reason of the forms beyond `MAX_FORMS`; schemes with the most give first and keep a spread."""
    by_scheme: dict[str, list[str]] = {}
    for label, candidate in forms.items():
        by_scheme.setdefault(candidate.scheme, []).append(label)
    quotas = {scheme: len(labels) for scheme, labels in by_scheme.items()}
    while sum(quotas.values()) > max(MAX_FORMS, len(quotas)):
        quotas[max(quotas, key=lambda scheme: quotas[scheme])] -= 1
    refused: dict[str, str] = {}
    for scheme, labels in by_scheme.items():
        kept = _spread(labels, forms, quotas[scheme])
        why = f"{MAX_FORMS} forms per layer are measured: of {scheme} {quotas[scheme]}, spread over {len(labels)}"
        refused |= {label: why for label in labels if label not in kept}
    return refused


def _spread(labels: Sequence[str], forms: Mapping[str, Candidate], size: int) -> set[str]:
    """`size` labels whose MACs lie evenly between the fewest and the most, by ratio: cheap forms gain the most."""
    macs = {label: math.log(max(forms[label].macs, 1)) for label in labels}
    low, high = min(macs.values()), max(macs.values())
    left = list(labels)
    for place in range(size):
        wanted = low + (high - low) * place / max(size - 1, 1)
        left.remove(min(left, key=lambda label: abs(macs[label] - wanted)))
    return set(labels) - set(left)
