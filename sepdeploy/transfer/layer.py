"""Weights for one separable form from one trained convolution: in closed form, then anchored to the original network.

Anchored transfer goes layer by layer, on the inputs that the converted network really gives each layer: closed-form
factors of the kernel, whitened by the second moments of those inputs; then a ridge least-squares solve of the last
factors (of all terms together) and the bias against the ORIGINAL network's output at that place; then a descent on all
factors (`refine.py`). Where a nonlinearity or a shortcut follows, both are repeated against the original network's
output behind it (`anchor.py`), if held-out images gain by it. The errors of the layers before are thus corrected as far
as the layer can, not passed on.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from sepdeploy.core.chain import Factor
from sepdeploy.core.conv import ConvSite
from sepdeploy.core.plan import Candidate
from sepdeploy.core.report import LayerTransfer
from sepdeploy.errors import ContractError, UnsupportedModelError
from sepdeploy.schemes.kernels import compose_kernels, kernel_error
from sepdeploy.schemes.module import ChainConv2d, chain_class, layer_kernel
from sepdeploy.schemes.scheme import Scheme, find_scheme
from sepdeploy.transfer.anchor import Anchor, find_anchor, run_to_anchor
from sepdeploy.transfer.last_factors import (
    best_solution,
    grouped_outputs,
    last_factor_columns,
    last_factors_as_matrix,
    set_last_factors,
)
from sepdeploy.transfer.moments import LeastSquaresSums, patch_moments, patches
from sepdeploy.transfer.prefix import run_until
from sepdeploy.transfer.refine import MAX_WINDOW_FEATURES, refine_factors

__all__ = [
    "Batches",
    "TransferMethod",
    "anchor_of",
    "held_out_images",
    "held_out_rows",
    "input_moments",
    "not_finite",
    "transfer_layer",
]

Batches = Callable[[], Iterable[Tensor]]
"""Starts a new pass over the calibration images: batches as the network takes them, float32."""

TransferMethod = Literal["data-free", "whitened", "anchored"]
"""Closed form of the kernel; the same, whitened by the inputs in the original network; `transfer_layer` in full."""

_MOMENT_IMAGES = 128
"""Images for the whitening: K*K x K*K matrices need far fewer samples than the solve does."""

_MAX_MOMENT_FEATURES = 4608
"""Widest patch of a first factor that is whitened, 512 channels at 3x3: its moments are factorized in seconds. Wider
ones are factorized data-free and their last factors then fitted."""

_HELD_OUT_EVERY = 4
"""One image of so many is held out to choose the ridge by; the final solve uses all."""

_ENOUGH_POSITIONS = 2**17
_ENOUGH_IMAGES = 128
"""A solve stops reading images once it has this many of both: early layers have thousands of positions per image."""

_ANCHOR_IMAGES = 8
"""Images on which the place for that is found."""

_SAME_KERNEL = 1e-6
"""Relative change of a kernel below which two factorizations compute the same."""


@torch.no_grad()
def transfer_layer(
    original: nn.Module,
    converted: nn.Module,
    site: ConvSite,
    candidate: Candidate,
    batches: Batches,
    method: TransferMethod,
    *,
    is_quick: bool = False,
) -> tuple[ChainConv2d, LayerTransfer]:
    """The module that takes the place of one convolution.

    Args:
        original: The trained network, untouched.
        converted: A copy in which the layers before this one are converted already; its convolution `site` is not.
        site: The convolution.
        candidate: What it becomes.
        batches: Calibration images; several passes are made.
        method: 'data-free' needs no images; the others do.
        is_quick: Whether to leave out what is repeated behind a nonlinearity, and its passes over the images.

    Returns:
        The module with its weights, and how well it imitates the convolution.
    """
    if site.spec is None:
        raise ContractError(f"{site.name} has no 2-D geometry")
    conv = original.get_submodule(site.name)
    weight = layer_kernel(conv)
    bias = getattr(conv, "bias", None)
    scheme = find_scheme(candidate.scheme)
    data_free = scheme.factorize(weight, candidate.form)
    error = kernel_error(weight, data_free, candidate.form)
    has_bias = method == "anchored" or site.spec.has_bias
    module = chain_class(conv)(candidate.form, site.spec, bias=has_bias, dtype=weight.dtype).eval()
    module.set_weights(data_free, bias)
    if method == "data-free":
        return module, LayerTransfer(site.name, error, None, method)
    if method == "whitened":
        (moments,) = input_moments((module,), original, site, batches)
        if moments is not None:
            module.set_weights(scheme.factorize(weight, candidate.form, moments), bias)
        return module, LayerTransfer(site.name, error, None, method)

    anchor = anchor_of(original, site, batches)
    slopes = weight.new_ones(len(weight)).double() if anchor is None else anchor.slopes
    # In units of the anchor, so that each channel counts as much as it does there.
    scaled = (weight.double() * slopes[:, None, None, None]).to(weight.dtype)
    (moments,) = input_moments((module,), converted, site, batches)
    factors = data_free if moments is None and anchor is None else scheme.factorize(scaled, candidate.form, moments)
    module.set_weights(factors, None if bias is None else bias * slopes)
    output_error = _fit(module, original, converted, site, anchor, batches, is_quick=is_quick)
    module.scale_outputs(1 / slopes, torch.zeros_like(slopes))
    _factorize_anew(module, scheme, moments)
    return module, LayerTransfer(site.name, error, output_error, method)


def anchor_of(original: nn.Module, site: ConvSite, batches: Batches) -> Anchor | None:
    """Where the layer is held against the original network; None for its own output."""
    if len(site.calls) != 1:
        return None
    batch = next(iter(batches()), None)
    return None if batch is None else find_anchor(original, site.name, batch[:_ANCHOR_IMAGES])


def _factorize_anew(module: ChainConv2d, scheme: Scheme, moments: Tensor | None) -> None:
    """Factorize the kernel that the solve found once more, for weights that int8 can hold; in place.

    The solve leaves terms that partly cancel each other, which int8 cannot afford. Where the closed form is exact for
    a kernel that the form can hold, its factors compute the same but are orthogonal and of even scale.
    """
    solved = compose_kernels(
        tuple(tuple(weight.double() for weight in term) for term in module.factor_weights()), module.form, module.groups
    )
    weights = scheme.factorize(solved, module.form, moments)
    change = compose_kernels(weights, module.form, module.groups) - solved
    if float(change.norm()) <= _SAME_KERNEL * float(solved.norm()):
        module.set_weights(weights, module.bias)


def input_moments(
    modules: Sequence[ChainConv2d], converted: nn.Module, site: ConvSite, batches: Batches
) -> tuple[Tensor | None, ...]:
    """Second moments of the first factor's patches on the converted network's own inputs, (G, n, n) float64 each.

    One pass for all modules, which are forms of the same layer; None where the patches are too wide.
    """
    firsts = [module.form.terms[0].factors[0] for module in modules]
    narrow = [first if math.prod(first.weight_shape[1:]) <= _MAX_MOMENT_FEATURES else None for first in firsts]
    # Moments do not depend on how many channels the factor returns.
    wanted = {_reading_of(first): first for first in narrow if first is not None}
    totals: dict[Factor, Tensor] = {}
    images = 0
    for batch in batches() if wanted else ():
        batch = batch[: _MOMENT_IMAGES - images]
        images += len(batch)
        for x in run_until(converted, site.name, batch, calls=len(site.calls), needs_outputs=False).inputs:
            padded = modules[0].pad(x)
            for key, first in wanted.items():
                part = patch_moments(padded, first)
                totals[key] = totals[key] + part if key in totals else part
        if images == _MOMENT_IMAGES:
            break
    if len(totals) < len(wanted):
        raise ContractError("no calibration images")
    if not all(bool(torch.isfinite(total).all()) for total in totals.values()):
        raise UnsupportedModelError(not_finite(site))
    return tuple(None if first is None else totals[_reading_of(first)] for first in narrow)


def _reading_of(factor: Factor) -> Factor:
    """A factor that reads the same patches, whatever it returns."""
    return replace(factor, out_channels=factor.groups, has_bias=False)


@dataclass(frozen=True, slots=True)
class _Reading:
    """What one pass over the calibration images gives.

    Attributes:
        fit: For the last factors, on three quarters of the images.
        held_out: The same on the rest.
        window_fit: For all factors, over window patches; empty if those are too wide.
        window_held_out: The same on the rest.
        held_out_error: Relative error behind the nonlinearity of what the layer returned during the pass, on the rest;
            0 without an anchor.
        images: How many were read.
    """

    fit: LeastSquaresSums
    held_out: LeastSquaresSums
    window_fit: LeastSquaresSums
    window_held_out: LeastSquaresSums
    held_out_error: float
    images: int


def _fit(
    module: ChainConv2d,
    original: nn.Module,
    converted: nn.Module,
    site: ConvSite,
    anchor: Anchor | None,
    batches: Batches,
    *,
    is_quick: bool,
) -> float:
    """Fit the weights in place, in units of the anchor; returns the relative error of the outputs there."""
    output_error = _solve(module, site, _read(module, original, converted, site, anchor, batches, is_first=True))
    if anchor is None or anchor.is_affine or is_quick:
        return output_error  # where nothing nonlinear follows, the solve has minimized just that
    reading = _read(module, original, converted, site, anchor, batches, is_first=False)
    before = copy.deepcopy(module.state_dict())
    _solve(module, site, reading)
    error = _held_out_error(module, original, converted, site, anchor, batches, reading.images)
    if error < reading.held_out_error:
        return error
    module.load_state_dict(before)
    return reading.held_out_error


def _read(
    module: ChainConv2d,
    original: nn.Module,
    converted: nn.Module,
    site: ConvSite,
    anchor: Anchor | None,
    batches: Batches,
    *,
    is_first: bool,
) -> _Reading:
    """One pass over the images, which stops when it has seen enough.

    In the first one the layer in the converted network returns what the original one does, later what `module` does.
    """
    prior = last_factors_as_matrix(module)
    groups, features, outputs = prior.shape
    out_groups = module.form.terms[0].factors[-1].out_groups
    fit, held_out = (LeastSquaresSums(groups, features - 1, outputs) for _ in range(2))
    window = module.spec.as_factor()
    features = window.params // window.out_channels
    is_narrow = features <= MAX_WINDOW_FEATURES
    window_fit, window_held_out = (
        LeastSquaresSums(window.groups, features if is_narrow else 0, window.out_channels // window.groups)
        for _ in range(2)
    )
    errors = _AnchorErrors()
    images = 0
    for batch in batches():
        if images >= _ENOUGH_IMAGES and fit.positions + held_out.positions >= _ENOUGH_POSITIONS:
            break
        is_held_out = held_out_images(images, len(batch))
        images += len(batch)
        for x, y in _pairs(module, original, converted, site, anchor, batch, is_held_out, errors, is_first=is_first):
            # Under autocast the network may hand on half precision.
            x = x.to(module.factor_weights()[0][-1].dtype)
            rows = held_out_rows(is_held_out, x)
            for sums, window_sums, part in ((fit, window_fit, ~rows), (held_out, window_held_out, rows)):
                if len(x[part]):
                    sums.add(last_factor_columns(module, x[part]), grouped_outputs(y[part], out_groups))
                if is_narrow and len(x[part]):
                    columns = patches(module.pad(x[part]), window)
                    window_sums.add(columns, grouped_outputs(y[part], window.out_groups))
    return _Reading(fit, held_out, window_fit, window_held_out, errors.ratio(), images)


def _held_out_error(
    module: ChainConv2d,
    original: nn.Module,
    converted: nn.Module,
    site: ConvSite,
    anchor: Anchor,
    batches: Batches,
    images: int,
) -> float:
    """Relative error at the anchor with the layer as it is now, on those of the first `images` that are held out."""
    errors = _AnchorErrors()
    seen = 0
    for batch in batches():
        rows = held_out_images(seen, len(batch))
        if bool(rows.any()) or images < _HELD_OUT_EVERY:
            part = batch if images < _HELD_OUT_EVERY else batch[rows]
            every = torch.ones(len(part), dtype=torch.bool)
            _pairs(module, original, converted, site, anchor, part, every, errors, is_first=False)
        seen += len(batch)
        if seen >= images:
            break
    return errors.ratio()


def held_out_images(first: int, count: int) -> Tensor:
    """Which images of a batch, whose first one has the number `first` among all, are held out; (count,)."""
    return torch.arange(first, first + count) % _HELD_OUT_EVERY == _HELD_OUT_EVERY - 1


def held_out_rows(is_held_out: Tensor, x: Tensor) -> Tensor:
    """The same for the rows of `x`: linear layers have several positions per image."""
    repeats, rest = divmod(len(x), len(is_held_out))
    return held_out_images(0, len(x)) if rest else is_held_out.repeat_interleave(repeats)


class _AnchorErrors:
    """Squared errors at the anchor, added up over batches: of held-out images, and of all in case none is held out."""

    def __init__(self) -> None:
        self._squares = [0.0, 0.0]
        self._energies = [0.0, 0.0]

    def add(self, wanted: Tensor, result: Tensor, is_held_out: Tensor) -> None:
        """Add a batch, (N, C, H, W) each, and which of its images are held out."""
        rows = held_out_rows(is_held_out, wanted)
        for index, part in enumerate((rows, torch.ones_like(rows))):
            self._squares[index] += float((wanted[part] - result[part]).double().square().sum())
            self._energies[index] += float(wanted[part].double().square().sum())

    def ratio(self) -> float:
        """|error| / |wanted|."""
        index = 0 if self._energies[0] else 1
        return math.sqrt(self._squares[index] / max(self._energies[index], 1e-30))


def _pairs(
    module: ChainConv2d,
    original: nn.Module,
    converted: nn.Module,
    site: ConvSite,
    anchor: Anchor | None,
    batch: Tensor,
    is_held_out: Tensor,
    errors: _AnchorErrors,
    *,
    is_first: bool,
) -> list[tuple[Tensor, Tensor]]:
    """Inputs of the layer in the converted network, and what it should return for them in units of the anchor."""
    calls = len(site.calls)
    if anchor is None:
        inputs = run_until(converted, site.name, batch, calls=calls, needs_outputs=False).inputs
        targets = run_until(original, site.name, batch, calls=calls, needs_outputs=True).outputs
        return list(zip(inputs, targets, strict=True))
    dtype = module.factor_weights()[0][-1].dtype
    slopes, gains = (values[:, None, None].to(dtype) for values in (anchor.slopes, anchor.gains))
    wanted = run_to_anchor(original, site.name, batch, anchor)

    def present(x: Tensor) -> Tensor:
        return wanted.output if is_first else ChainConv2d.forward(module, x.to(dtype)) / slopes

    found = run_to_anchor(converted, site.name, batch, anchor, present)
    errors.add(wanted.result, found.result, is_held_out)
    return [(found.input, found.output.to(dtype) * slopes + gains * (wanted.result - found.result).to(dtype))]


def _solve(module: ChainConv2d, site: ConvSite, reading: _Reading) -> float:
    """Solve for the last factors, then refine all, in place; returns the relative error of the outputs."""
    total = reading.fit + reading.held_out
    if not math.isfinite(total.target_energy) or not bool(torch.isfinite(total.gram).all()):
        raise UnsupportedModelError(not_finite(site))
    solution = best_solution(reading.fit, reading.held_out, total, last_factors_as_matrix(module))
    set_last_factors(module, solution)
    if reading.window_fit.positions:
        return refine_factors(module, reading.window_fit, reading.window_held_out)
    energy = max(total.target_energy, 1e-30)
    return float((total.squared_error(solution) / energy) ** 0.5)


def not_finite(site: ConvSite) -> str:
    """The sentence for a network whose activations overflow."""
    return (
        f"the convolution {site.name} reads or returns NaN or values too large for float32 on the calibration images; "
        "check the preprocess file and the checkpoint"
    )
