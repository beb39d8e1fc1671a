"""Separable variants of a network at equal cost, to be trained from scratch (the o-, d-, s-, so- and dw- networks).

Every convolution is replaced by the form that a scheme designs for it, with fresh weights, and all channels are
multiplied until the variant costs what the original costs: the `_m` networks of "Optimized Separable Convolution".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sepdeploy.analyze.trace import conv_spec, trace_network
from sepdeploy.core.chain import ChainSum
from sepdeploy.core.conv import ConvSite, ConvSpec, Trace
from sepdeploy.core.design import DesignOptions, DesignResult, with_middle
from sepdeploy.core.plan import Candidate, Decision, Kept, Plan, Reason, Replaced
from sepdeploy.core.progress import Progress, Silent
from sepdeploy.core.quiet import error_summary, quiet
from sepdeploy.core.receptive_field import receptive_field
from sepdeploy.core.report import NetworkCost
from sepdeploy.errors import ContractError, UsageError
from sepdeploy.loading.arch import Architecture, build_architecture
from sepdeploy.loading.width_argument import ScaledArchitecture, scaled_architecture
from sepdeploy.passes.replace_convs import copy_network, replace_modules
from sepdeploy.planning.candidates import drop_failing
from sepdeploy.planning.match_multiplier import match_multiplier
from sepdeploy.schemes.fresh_weights import draw_weights
from sepdeploy.schemes.module import ChainConv2d
from sepdeploy.schemes.scheme import find_scheme

__all__ = ["DesignedNetwork", "design_network"]

_Forms = dict[str, tuple[ConvSpec, ChainSum]]
"""Convolution -> its geometry and what replaces it."""


@dataclass(frozen=True, slots=True, eq=False)
class DesignedNetwork:
    """A variant with fresh weights.

    Attributes:
        module: The network.
        architecture: Where its code comes from, at its width.
        plan: What replaced each convolution.
        result: Its cost beside the original's.
    """

    module: nn.Module
    architecture: Architecture
    plan: Plan
    result: DesignResult


def design_network(options: DesignOptions, progress: Progress | None = None) -> DesignedNetwork:
    """Build the variant of `options.arch` under one scheme, at the channel multiplier that matches the original's cost.

    Raises:
        UsageError: if nothing can be replaced, the architecture cannot be scaled, or no multiplier fits.
    """
    with torch.random.fork_rng(devices=[]):
        return _design(options, progress or Silent())


def _design(options: DesignOptions, progress: Progress) -> DesignedNetwork:
    progress.stage(f"tracing {options.arch}")
    network = copy_network(build_architecture(options.arch).module).eval()  # the spec may name an object, not a factory
    traced = trace_network(network, torch.zeros(1, *options.input_shape))
    original = NetworkCost(traced.total_macs, traced.total_params, len(traced.sites))
    unfit = _unfit_sites(network, traced, options)
    scaled = scaled_architecture(options.arch, options.width_argument)
    multiplier = options.multiplier
    if multiplier is not None:
        _cost_at(scaled.at(multiplier), unfit, options)  # refuses a width that the network does not run at
    else:
        progress.stage(f"searching the channel multiplier for {options.scheme}")
        multiplier, _ = match_multiplier(
            lambda value: _cost_at(scaled.at(value), unfit, options), original, options.match, options.step
        )
    progress.stage(f"building {options.scheme} at channel multiplier {multiplier:g}")
    return _built(scaled, multiplier, unfit, original, options)


def _unfit_sites(network: nn.Module, traced: Trace, options: DesignOptions) -> dict[str, Kept]:
    """Convolutions that no scheme can replace, at whatever width; the network at multiplier 1 shows which."""
    unfit, decisions = {}, []
    for site in traced.sites:
        if site.reason is not None:
            unfit[site.name] = Kept(site.reason)
        elif site.spec is not None and isinstance(form := _form(site.spec, options), ChainSum):
            decisions.append(Decision(site.name, 0, 0, Replaced(Candidate(options.scheme, form, 0, 0))))
    plan = Plan(options.scheme, options.scheme_options, tuple(decisions))
    return unfit | drop_failing(network, traced, plan, torch.zeros(traced.input_shape)).kept


def _form(spec: ConvSpec, options: DesignOptions) -> ChainSum | Kept:
    """What a convolution of this geometry becomes, or why it stays."""
    if spec.is_pointwise and not options.replaces_pointwise:
        return Kept(Reason.POINTWISE, "--replace-pointwise offers it to the scheme")
    scheme = find_scheme(options.scheme)
    refusal = scheme.check(spec)
    if refusal is not None:
        return Kept(refusal)
    try:
        form = scheme.design(spec, options.scheme_options)
    except UsageError as error:
        return Kept(Reason.OPTIONS_DO_NOT_FIT, str(error))
    return with_middle(form, options.middle, options.activation)


def _replace(network: nn.Module, unfit: Mapping[str, Kept], options: DesignOptions) -> _Forms:
    """Put the forms into the network, with the output variance and the bias of the convolutions' own fresh weights."""
    forms: _Forms = {}
    replacements = {}
    for name, conv in network.named_modules():
        if not isinstance(conv, nn.Conv2d) or name in unfit:
            continue
        spec = conv_spec(conv)
        form = _form(spec, options)
        if isinstance(form, ChainSum):
            forms[name] = (spec, form)
            replacements[name] = ChainConv2d(form, spec, bias=spec.has_bias, dtype=conv.weight.dtype)
            if not conv.weight.is_meta:
                variance = float(conv.weight.detach().square().mean()) * conv.weight[0].numel()
                draw_weights(replacements[name], variance, conv.bias)
    replace_modules(network, replacements)
    return forms


@torch.no_grad()
def _cost_at(spec: str, unfit: Mapping[str, Kept], options: DesignOptions) -> NetworkCost:
    """Cost of a variant that is never computed: on the meta device, or on the CPU where the network refuses that."""
    for device in ("meta", "cpu"):
        try:
            with torch.device(device), quiet():
                network = copy_network(build_architecture(spec).module).eval()
                replaced = _replace(network, unfit, options)
                with FlopCounterMode(display=False) as counter:
                    network(torch.zeros(1, *options.input_shape))
        except Exception as error:  # the user's code: it may need real values, or fail at this width
            if device == "cpu":
                is_ours = isinstance(error, UsageError)
                reason = error if is_ours else f"{spec} does not run as {options.scheme}: {error_summary(error)}"
                raise UsageError(f"{reason}; give a --multiplier that the network can be built at") from error
        else:
            params = sum(parameter.numel() for parameter in network.parameters())
            return NetworkCost(counter.get_total_flops() // 2, params, len(replaced))
    raise ContractError("no device is left")


def _built(
    scaled: ScaledArchitecture,
    multiplier: float,
    unfit: Mapping[str, Kept],
    original: NetworkCost,
    options: DesignOptions,
) -> DesignedNetwork:
    """The variant with real weights, traced: all costs are those of the network that is handed over."""
    example = torch.zeros(1, *options.input_shape)
    torch.manual_seed(options.seed)
    architecture = build_architecture(scaled.at(multiplier))
    network = copy_network(architecture.module)
    was_training = network.training
    dense = trace_network(network.eval(), example)
    forms = _replace(network, unfit, options)
    traced = trace_network(network, example)
    network.train(was_training)
    plan = _plan(dense, traced, forms, unfit, options)
    if not forms:
        reasons = dict.fromkeys(": ".join(filter(None, (k.reason.value, k.detail))) for k in plan.kept.values())
        raise UsageError(f"{options.scheme} replaces no convolution of {options.arch}: {'; '.join(reasons)}")
    result = DesignResult(
        name=_variant_name(scaled.factory, options.scheme, multiplier),
        scheme=options.scheme,
        arch=architecture.spec,
        multiplier=multiplier,
        input_shape=options.input_shape,
        original=original,
        variant=NetworkCost(traced.total_macs, traced.total_params, len(dense.sites)),
        replaced=len(forms),
        keeps_receptive_field=_keep_receptive_field(forms),
    )
    return DesignedNetwork(network, architecture, plan, result)


def _variant_name(factory: str, scheme: str, multiplier: float) -> str:
    """Such as 'o-resnet20_m3.625'."""
    suffix = "" if multiplier == 1 else f"_m{multiplier:g}"
    return f"{find_scheme(scheme).prefix or f'{scheme}-'}{factory}{suffix}"


def _keep_receptive_field(forms: _Forms) -> bool:
    """Whether every replaced convolution still sees all that it saw."""
    covers: Callable[[ConvSpec, ChainSum], bool] = cache(
        lambda spec, form: receptive_field(form).covers(receptive_field(spec.as_factor()))
    )
    return all(covers(spec, form) for spec, form in forms.values())


def _plan(dense: Trace, variant: Trace, forms: _Forms, unfit: Mapping[str, Kept], options: DesignOptions) -> Plan:
    """What became of each convolution, with the MACs that the trace of the variant shows."""

    def outcome(site: ConvSite) -> Replaced | Kept:
        if site.name in forms:
            spec, form = forms[site.name]
            macs = sum(part.macs for part in variant.sites if part.name.startswith(f"{site.name}."))
            params = form.params + (spec.out_channels if spec.has_bias else 0)
            return Replaced(Candidate(options.scheme, form, macs, params))
        found = unfit.get(site.name) or (_form(site.spec, options) if site.spec else None)
        if isinstance(found, Kept):
            return found
        raise ContractError(f"{site.name} was neither replaced nor kept")

    decisions = tuple(Decision(site.name, site.macs, site.params, outcome(site)) for site in dense.sites)
    return Plan(options.scheme, options.scheme_options, decisions)
