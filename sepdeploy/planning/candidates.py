"""What each convolution could become under one scheme, or why not."""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor, nn

from sepdeploy.analyze.trace import output_tensors
from sepdeploy.core.chain import Chain, ChainSum
from sepdeploy.core.conv import ConvSite, Trace
from sepdeploy.core.passing_errors import is_out_of_memory
from sepdeploy.core.plan import Candidate, Decision, Kept, Plan, Reason, Replaced, SchemeOptions
from sepdeploy.core.quiet import error_summary
from sepdeploy.errors import ContractError, UsageError
from sepdeploy.passes.replace_convs import copy_network, replace_modules
from sepdeploy.schemes.kernels import kernel_error
from sepdeploy.schemes.module import ChainConv2d, chain_class, layer_kernel
from sepdeploy.schemes.scheme import Scheme, find_scheme

__all__ = ["drop_failing", "find_candidate", "propose_plan"]


_MACS_ALLOWANCE = 1.1
"""Alternatives within this of the fewest MACs count as equally cheap: then the nearer to the kernel is better."""


def find_candidate(
    site: ConvSite, scheme: Scheme, options: SchemeOptions, weight: Tensor | None = None
) -> Candidate | Kept:
    """The separable form of one convolution, or why it stays dense.

    Args:
        site: The convolution.
        scheme: What it is to become.
        options: Hyper-parameters of the scheme.
        weight: Its kernel, (O, I / groups, Kh, Kw): where the options leave several forms of about the same cost, the
            one nearest to it is taken; None takes the scheme's first.
    """
    if site.reason is not None:
        return Kept(site.reason)
    if site.spec is None:
        raise ContractError(f"{site.name} has neither a geometry nor a reason")
    refusal = scheme.check(site.spec)
    if refusal is not None:
        return Kept(refusal)
    try:
        forms = (scheme.design(site.spec, options), *scheme.alternatives(site.spec, options))
    except UsageError as error:
        return Kept(Reason.OPTIONS_DO_NOT_FIT, str(error))
    macs = {form: _macs_of(form, site) for form in forms}
    fewest = min(macs.values())
    if fewest >= site.macs:
        return Kept(Reason.NOT_CHEAPER, f"{fewest} MACs against {site.macs}")
    cheap = [form for form in forms if macs[form] <= min(_MACS_ALLOWANCE * fewest, site.macs)]
    if len(cheap) > 1 and weight is not None:
        chosen = min(cheap, key=lambda form: kernel_error(weight, scheme.factorize(weight, form), form))
    else:
        chosen = cheap[0]
    # Every converted layer has a bias: the anchored solve sets one.
    return Candidate(scheme.name, chosen, macs[chosen], chosen.params + site.spec.out_channels)


def _macs_of(form: ChainSum, site: ConvSite) -> int:
    """Multiply-accumulates of a form over all calls of a convolution."""
    macs = 0
    for call in site.calls:
        images, _, height, width = call.input_shape
        if site.spec is not None and site.spec.padding_mode != "zeros":
            top, bottom, left, right = site.spec.padding
            height, width = height + top + bottom, width + left + right
        macs += form.macs((height, width)) * images
    return macs


def propose_plan(trace: Trace, scheme_name: str, options: SchemeOptions, network: nn.Module | None = None) -> Plan:
    """A plan that replaces every convolution that the scheme can make cheaper.

    Args:
        trace: The network's convolutions.
        scheme_name: Name in the registry.
        options: Hyper-parameters of the scheme.
        network: The trained network, to choose by its weights where the options leave a choice.

    Raises:
        UsageError: if there is no scheme of that name.
    """
    scheme = find_scheme(scheme_name)
    decisions = []
    for site in trace.sites:
        module = network.get_submodule(site.name) if network is not None and site.reason is None else None
        weight = layer_kernel(module) if module is not None else None
        found = find_candidate(site, scheme, options, weight)
        outcome = found if isinstance(found, Kept) else Replaced(found)
        decisions.append(Decision(site.name, site.macs, site.params, outcome))
    return Plan(scheme_name, options, tuple(decisions))


def drop_failing(original: nn.Module, trace: Trace, plan: Plan, example: Tensor) -> Plan:
    """Keep those convolutions that cannot be swapped without the network noticing.

    Each is put in the form of a one-factor chain with its own weights, which computes the same. A network that then
    fails, returns something else, or goes on calling the old object looks into its convolutions (their type, a private
    attribute) or holds them in a place of its own (a plain list). All are tried together first; only if that
    fails, one after the other.
    """
    names = tuple(plan.replaced)
    if not names or not _failure(original, trace, names, example):
        return plan
    working: tuple[str, ...] = ()
    for name in names:
        detail = _failure(original, trace, (*working, name), example)
        if detail:
            plan = plan.with_outcome(name, Kept(Reason.REPLACEMENT_FAILS, detail))
        else:
            working = (*working, name)
    return plan


@torch.no_grad()
def _failure(original: nn.Module, trace: Trace, names: tuple[str, ...], example: Tensor) -> str:
    """What goes wrong with `names` replaced by equals, in a few words; empty if nothing does."""
    trial = copy_network(original)
    calls: Counter[str] = Counter()
    try:
        for name in names:
            twin = _twin(trial.get_submodule(name), trace.site(name))
            twin.register_forward_hook(lambda _module, _args, _output, name=name: calls.update([name]))
            replace_modules(trial, {name: twin})
        expected = output_tensors(original(example.clone()))
        outputs = output_tensors(trial(example.clone()))
    except Exception as error:  # user code: whatever it raises is the reason
        if is_out_of_memory(error):
            raise  # no fault of the layer's, which would stay as it is in all later runs too
        return error_summary(error)
    shapes = tuple(tuple(output.shape) for output in outputs)
    if shapes != trace.output_shapes:
        return f"its outputs become {shapes}, not {trace.output_shapes}"
    for name in names:
        if calls[name] != len(trace.site(name).calls):
            return "its forward pass goes on using the old convolution"
    if not all(map(_is_close, outputs, expected)):
        return "its outputs change although the replacement computes the same"
    return ""


def _twin(conv: nn.Module, site: ConvSite) -> ChainConv2d:
    """The convolution itself, as a chain of one factor."""
    if site.spec is None:
        raise ContractError(f"{site.name} has no geometry")
    kernel = layer_kernel(conv)
    form = ChainSum((Chain((site.spec.as_factor(),)),))
    twin = chain_class(conv)(form, site.spec, bias=site.spec.has_bias, dtype=kernel.dtype).eval()
    twin.set_weights(((kernel,),), getattr(conv, "bias", None))
    return twin


def _is_close(output: Tensor, expected: Tensor) -> bool:
    """Equal up to rounding; class indices and the like are not compared."""
    if not expected.is_floating_point() or not expected.numel():
        return True
    scale = float(expected.nan_to_num(0, 0, 0).abs().max())
    return torch.allclose(output, expected, rtol=1e-3, atol=1e-4 * scale, equal_nan=True)
