"""What each convolution could become under one scheme, or why not."""

from __future__ import annotations

from sepdeploy.core.conv import ConvSite, Trace
from sepdeploy.core.plan import Candidate, Decision, Kept, Plan, Reason, Replaced, SchemeOptions
from sepdeploy.errors import ContractError
from sepdeploy.schemes.scheme import Scheme, find_scheme

__all__ = ["find_candidate", "propose_plan"]


def find_candidate(site: ConvSite, scheme: Scheme, options: SchemeOptions) -> Candidate | Kept:
    """The separable form of one convolution, or why it stays dense."""
    if site.reason is not None:
        return Kept(site.reason)
    if site.spec is None:
        raise ContractError(f"{site.name} has neither a geometry nor a reason")
    refusal = scheme.check(site.spec)
    if refusal is not None:
        return Kept(refusal)
    form = scheme.design(site.spec, options)
    macs = 0
    for call in site.calls:
        height, width = call.input_shape[-2:]
        if site.spec.padding_mode != "zeros":
            top, bottom, left, right = site.spec.padding
            height, width = height + top + bottom, width + left + right
        macs += form.macs((height, width)) * (call.input_shape[0] if len(call.input_shape) == 4 else 1)
    if macs >= site.macs:
        return Kept(Reason.NOT_CHEAPER, f"{macs} MACs against {site.macs}")
    # Every converted layer has a bias: the anchored solve sets one.
    return Candidate(scheme.name, form, macs, form.params + site.spec.out_channels)


def propose_plan(trace: Trace, scheme_name: str, options: SchemeOptions) -> Plan:
    """A plan that replaces every convolution that the scheme can make cheaper.

    Raises:
        UsageError: if there is no scheme of that name.
    """
    scheme = find_scheme(scheme_name)
    decisions = []
    for site in trace.sites:
        found = find_candidate(site, scheme, options)
        outcome = found if isinstance(found, Kept) else Replaced(found)
        decisions.append(Decision(site.name, site.macs, site.params, outcome))
    return Plan(scheme_name, options, tuple(decisions))
