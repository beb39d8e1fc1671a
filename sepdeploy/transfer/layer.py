"""Weights for one separable form from one trained convolution: in closed form, then anchored to the original network.

Anchored transfer goes layer by layer, on the inputs that the converted network really gives each layer: closed-form
factors of the kernel, whitened by the second moments of those inputs; then a ridge least-squares solve of the last
factors (of all terms together) and the bias against the ORIGINAL network's output at that place; then a descent on all
factors (`refine.py`). The errors of the layers before are thus corrected as far as the layer can, not passed on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Literal

import torch
import torch.nn.functional as F  # noqa: N812 (PyTorch's own convention)
from torch import Tensor, nn

from sepdeploy.core.conv import ConvSite, ConvSpec
from sepdeploy.core.plan import Candidate
from sepdeploy.core.report import LayerTransfer
from sepdeploy.errors import ContractError, UnsupportedModelError
from sepdeploy.schemes.module import ChainConv2d, compose_kernels
from sepdeploy.schemes.scheme import find_scheme
from sepdeploy.transfer.moments import LeastSquaresSums, patch_moments, patches
from sepdeploy.transfer.prefix import run_until
from sepdeploy.transfer.refine import MAX_WINDOW_FEATURES, refine_factors

__all__ = ["Batches", "TransferMethod", "transfer_layer"]

Batches = Callable[[], Iterable[Tensor]]
"""Starts a new pass over the calibration images: batches as the network takes them, float32."""

TransferMethod = Literal["data-free", "anchored"]

_MOMENT_IMAGES = 128
"""Images for the whitening: K*K x K*K matrices need far fewer samples than the solve does."""

_HELD_OUT_RATIO = 0.25
"""Share of each batch on which the ridge is chosen; the final solve uses all."""

_ENOUGH_POSITIONS = 2**17
_ENOUGH_IMAGES = 128
"""A solve stops reading images once it has this many of both: early layers have thousands of positions per image."""

_RIDGES = (1e-6, 1e-4, 1e-3, 1e-2, 1e-1)


@torch.no_grad()
def transfer_layer(
    original: nn.Module,
    converted: nn.Module,
    site: ConvSite,
    candidate: Candidate,
    batches: Batches,
    method: TransferMethod,
) -> tuple[ChainConv2d, LayerTransfer]:
    """The module that takes the place of one convolution.

    Args:
        original: The trained network, untouched.
        converted: A copy in which the layers before this one are converted already; its convolution `site` is not.
        site: The convolution.
        candidate: What it becomes.
        batches: Calibration images; several passes are made.
        method: 'data-free' needs no images; 'anchored' does.

    Returns:
        The module with its weights, and how well it imitates the convolution.
    """
    if site.spec is None:
        raise ContractError(f"{site.name} has no 2-D geometry")
    conv = original.get_submodule(site.name)
    if not isinstance(conv, nn.Conv2d):
        raise ContractError(f"{site.name} is no nn.Conv2d")
    weight = conv.weight.detach()
    scheme = find_scheme(candidate.scheme)
    data_free = scheme.factorize(weight, candidate.form)
    approximation = compose_kernels(data_free, candidate.form, site.spec.groups)
    kernel_error = float((approximation.double() - weight.double()).norm() / weight.double().norm().clamp_min(1e-30))
    has_bias = method == "anchored" or site.spec.has_bias
    module = ChainConv2d(candidate.form, site.spec, bias=has_bias, dtype=weight.dtype).eval()
    module.set_weights(data_free, conv.bias)
    if method == "data-free":
        return module, LayerTransfer(site.name, kernel_error, None, "data-free")

    moments = _input_moments(converted, site, candidate, batches)
    module.set_weights(scheme.factorize(weight, candidate.form, moments), conv.bias)
    output_error = _solve(module, original, converted, site, batches)
    # The solve leaves terms that partly cancel each other, which int8 cannot afford. Factorizing the kernel that they
    # compute anew changes nothing (its rank is within the form's) but gives orthogonal terms of even scale.
    solved = compose_kernels(
        tuple(tuple(conv.weight.double() for conv in term) for term in module.factor_modules()),
        candidate.form,
        site.spec.groups,
    )
    module.set_weights(scheme.factorize(solved, candidate.form, moments), module.bias)
    return module, LayerTransfer(site.name, kernel_error, output_error, "anchored")


def _input_moments(converted: nn.Module, site: ConvSite, candidate: Candidate, batches: Batches) -> Tensor:
    """Second moments of the first factor's patches on the converted network's own inputs, (G, n, n) float64."""
    first = candidate.form.terms[0].factors[0]
    total: Tensor | None = None
    images = 0
    for batch in batches():
        batch = batch[: _MOMENT_IMAGES - images]
        images += len(batch)
        for x in run_until(converted, site.name, batch, calls=len(site.calls), needs_outputs=False).inputs:
            part = patch_moments(_padded(x, site.spec), first)
            total = part if total is None else total + part
        if images == _MOMENT_IMAGES:
            break
    if total is None:
        raise ContractError("no calibration images")
    if not bool(torch.isfinite(total).all()):
        raise UnsupportedModelError(_not_finite(site))
    return total


def _solve(module: ChainConv2d, original: nn.Module, converted: nn.Module, site: ConvSite, batches: Batches) -> float:
    """Fit the weights in place to the original outputs, in one pass; returns the relative error of the outputs."""
    prior = _last_factors_as_matrix(module)
    groups, features, outputs = prior.shape
    fit, held_out = (LeastSquaresSums(groups, features - 1, outputs) for _ in range(2))
    window = module.spec.as_factor()
    window_features = window.params // window.out_channels
    is_narrow = window_features <= MAX_WINDOW_FEATURES
    window_fit, window_held_out = (
        LeastSquaresSums(window.groups, window_features if is_narrow else 0, window.out_channels // window.groups)
        for _ in range(2)
    )
    images = 0
    for batch in batches():
        if images >= _ENOUGH_IMAGES and fit.positions + held_out.positions >= _ENOUGH_POSITIONS:
            break
        images += len(batch)
        calls = len(site.calls)
        inputs = run_until(converted, site.name, batch, calls=calls, needs_outputs=False).inputs
        targets = run_until(original, site.name, batch, calls=calls, needs_outputs=True).outputs
        for x, y in zip(inputs, targets, strict=True):
            # Under autocast the network may hand on half precision.
            x = x.to(module.factor_modules()[0][-1].weight.dtype)
            split = len(x) - int(len(x) * _HELD_OUT_RATIO)
            for sums, window_sums, part in (
                (fit, window_fit, slice(None, split)),
                (held_out, window_held_out, slice(split, None)),
            ):
                if len(x[part]):
                    sums.add(_last_factor_columns(module, x[part]), _grouped_outputs(y[part], groups))
                if is_narrow and len(x[part]):
                    columns = patches(_padded(x[part], module.spec), window)
                    window_sums.add(columns, _grouped_outputs(y[part], window.groups))
    total = fit + held_out
    if not math.isfinite(total.target_energy) or not bool(torch.isfinite(total.gram).all()):
        raise UnsupportedModelError(_not_finite(site))
    solution = _best_solution(fit, held_out, total, prior)
    _set_last_factors(module, solution)
    if is_narrow:
        return refine_factors(module, window_fit, window_held_out)
    energy = max(total.target_energy, 1e-30)
    return float((total.squared_error(solution) / energy) ** 0.5)


def _not_finite(site: ConvSite) -> str:
    """The sentence for a network whose activations overflow."""
    return (
        f"the convolution {site.name} reads or returns NaN or values too large for float32 on the calibration images; "
        "check the preprocess file and the checkpoint"
    )


def _best_solution(fit: LeastSquaresSums, held_out: LeastSquaresSums, total: LeastSquaresSums, prior: Tensor) -> Tensor:
    """The solution with the ridge that does best on held-out positions; the prior itself if none beats it."""
    if held_out.positions == 0:
        return total.solve(prior, _RIDGES[-1])
    errors = {ridge: held_out.squared_error(fit.solve(prior, ridge)) for ridge in _RIDGES}
    best = min(errors, key=lambda ridge: errors[ridge])
    if errors[best] >= held_out.squared_error(prior):
        return prior
    return total.solve(prior, best)


def _last_factor_columns(module: ChainConv2d, x: Tensor) -> Tensor:
    """What the last factors of all terms read for each output position, (G, n, P), stacked term by term."""
    x = _padded(x, module.spec)
    columns = []
    for term, chain in zip(module.terms, module.form.terms, strict=True):
        stages = list(term.children())
        # Everything up to the last convolution; its padding (a module of its own if asymmetric) is in `patches`.
        has_padding_module = len(stages) > 1 and isinstance(stages[-2], nn.ZeroPad2d)
        last_input = x
        for stage in stages[: -2 if has_padding_module else -1]:
            last_input = stage(last_input)
        columns.append(patches(last_input, chain.factors[-1]))
    return torch.cat(columns, dim=1)


def _last_factors_as_matrix(module: ChainConv2d) -> Tensor:
    """Last factors of all terms and the bias as one (G, n + 1, O / G) float64 matrix per group."""
    lasts = [term[-1] for term in module.factor_modules()]
    groups = lasts[0].groups
    if any(last.groups != groups for last in lasts):
        raise ContractError("the last factors of all terms must have the same groups")
    rows = [last.weight.double().reshape(groups, module.out_channels // groups, -1).mT for last in lasts]
    bias = module.bias
    if bias is None:
        raise ContractError("an anchored solve needs a bias")
    return torch.cat([*rows, bias.double().reshape(groups, 1, -1)], dim=1)


def _set_last_factors(module: ChainConv2d, solution: Tensor) -> None:
    """The inverse of `_last_factors_as_matrix`."""
    lasts = [term[-1] for term in module.factor_modules()]
    start = 0
    for last in lasts:
        rows = last.weight[0].numel()
        last.weight.copy_(solution[:, start : start + rows].mT.reshape(last.weight.shape))
        start += rows
    bias = module.bias
    if bias is not None:
        bias.copy_(solution[:, -1].reshape(-1))


def _grouped_outputs(y: Tensor, groups: int) -> Tensor:
    """(N, O, H, W) as (G, O / G, N * H * W), positions ordered as `patches` orders them."""
    batch, channels = y.shape[:2]
    return y.reshape(batch, groups, channels // groups, -1).permute(1, 2, 0, 3).flatten(2)


def _padded(x: Tensor, spec: ConvSpec | None) -> Tensor:
    """Apply a padding mode other than zeros, which no factor does itself."""
    if spec is None or spec.padding_mode == "zeros":
        return x
    top, bottom, left, right = spec.padding
    return F.pad(x, (left, right, top, bottom), mode=spec.padding_mode)
