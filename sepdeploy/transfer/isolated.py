"""Anchored transfer of one layer alone, to many forms at once, from sums over its inputs in the original network.

With nothing before the layer changed, the output that a form is to imitate is exactly W p + b for every window patch p.
So one pass over the images, which adds up [p; 1] [p; 1]^T, is enough for all forms: the moments that closed forms are
whitened by, the least-squares problem of the last factors and the error that all factors descend on follow from that
one matrix. It is what `transfer_layer` computes in its quick version, with no other layer replaced and up to the
sampling of the patches.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812 (PyTorch's own convention)
from torch import Tensor, nn

from sepdeploy.core.chain import Chain, ChainSum, Factor
from sepdeploy.core.conv import ConvSite, ConvSpec
from sepdeploy.core.plan import Candidate
from sepdeploy.errors import ContractError, UnsupportedModelError
from sepdeploy.schemes.kernels import compose_chain, compose_kernels, kernel_error, split_groups
from sepdeploy.schemes.module import ChainConv2d, chain_class, layer_kernel
from sepdeploy.schemes.scheme import find_scheme
from sepdeploy.transfer.last_factors import (
    best_solution,
    grouped_outputs,
    last_factor_columns,
    last_factors_as_matrix,
    set_last_factors,
)
from sepdeploy.transfer.layer import (
    Batches,
    anchor_of,
    held_out_images,
    held_out_rows,
    input_moments,
    not_finite,
)
from sepdeploy.transfer.moments import LeastSquaresSums, patches
from sepdeploy.transfer.prefix import run_until
from sepdeploy.transfer.refine import MAX_WINDOW_FEATURES, refine_factors

__all__ = ["isolated_transfers", "whitened_errors"]

_ENOUGH_IMAGES = 128
_LEAST_POSITIONS = 2**15
_POSITIONS_PER_FEATURE = 16
"""Of at least so many images at least so many positions are summed; layers that have more are sampled."""

_MAX_ROUNDS_FEATURES = 1200
"""Widest window whose forms are refined until held-out positions stop gaining; wider ones, whose steps take most of a
second, get one round, which brings most of it."""

_SUM_BYTES = 512 * 2**20
"""Memory for the sums of a layer that is too wide for one matrix: forms that need more take several passes."""


@torch.no_grad()
def isolated_transfers(
    original: nn.Module, site: ConvSite, candidates: Sequence[Candidate], batches: Batches
) -> Iterator[ChainConv2d]:
    """The layer in each of several forms, fitted with the rest of the network as it is.

    Args:
        original: The trained network in eval mode, on any device.
        site: The layer.
        candidates: What it could become.
        batches: Calibration images on the network's device. One pass is made; several for a layer whose patches are too
            wide for their moments.

    Yields:
        One module in eval mode per candidate, on the CPU.

    Raises:
        UnsupportedModelError: if the network does not run on the images, or the layer's inputs are not finite.
    """
    layer = _layer_of(original, site, batches)
    if layer.features > MAX_WINDOW_FEATURES:
        transfers = _wide_transfers(layer, original, candidates, batches)
    else:
        sums = _window_sums(layer, original, batches)
        transfers = (_transfer(layer, candidate, sums) for candidate in candidates)
    for module in transfers:
        module.scale_outputs(1 / layer.slopes, torch.zeros_like(layer.slopes))
        yield module


@torch.no_grad()
def whitened_errors(
    original: nn.Module, site: ConvSite, candidates: Sequence[Candidate], batches: Batches
) -> tuple[float, ...]:
    """Relative error |y - y'| / |y| of each form's outputs, in closed form on the original network's inputs.

    Of a layer whose patches are too wide for their moments, the relative error of the kernel. Arguments as those of
    `isolated_transfers`.
    """
    layer = _layer_of(original, site, batches)
    if layer.features > MAX_WINDOW_FEATURES:
        modules = (layer.module(candidate, None) for candidate in candidates)
        return tuple(kernel_error(layer.kernel, module.factor_weights(), module.form) for module in modules)
    total = _window_sums(layer, original, batches).total
    energy = max(total.target_energy, 1e-30)
    errors = []
    for candidate in candidates:
        module = _whitened(layer, candidate, total)
        kernel = compose_kernels(module.factor_weights(), module.form, layer.spec.groups)
        errors.append(math.sqrt(total.squared_error(layer.solution(kernel)) / energy))
    return tuple(errors)


@dataclass(frozen=True, slots=True)
class _Layer:
    """The layer to be imitated, in units in which each channel counts as much as behind the batch norm that follows.

    Attributes:
        site: Where it is.
        spec: Its geometry.
        kernel: Its kernel, scaled, (O, I / groups, Kh, Kw).
        bias: Its bias, scaled, (O,) float64; zeros if it has none.
        slopes: What both were multiplied by, (O,) float64; see `anchor.py`.
        module_class: What takes its place.
    """

    site: ConvSite
    spec: ConvSpec
    kernel: Tensor
    bias: Tensor
    slopes: Tensor
    module_class: type[ChainConv2d]

    @property
    def features(self) -> int:
        """Length of a window patch."""
        return math.prod(self.spec.as_factor().weight_shape[1:])

    def module(self, candidate: Candidate, moments: Tensor | None) -> ChainConv2d:
        """A form with its closed-form weights, whitened by the moments of its first factor's patches."""
        module = self.module_class(candidate.form, self.spec, bias=True, dtype=self.kernel.dtype).eval()
        module.set_weights(find_scheme(candidate.scheme).factorize(self.kernel, candidate.form, moments), self.bias)
        return module

    def solution(self, kernel: Tensor) -> Tensor:
        """A kernel with the layer's bias as `LeastSquaresSums` have it, (G, n + 1, O / G) float64."""
        groups = self.spec.groups
        columns = kernel.double().reshape(groups, len(kernel) // groups, -1)
        return torch.cat([columns, self.bias.reshape(groups, -1, 1)], dim=2).mT


def _layer_of(original: nn.Module, site: ConvSite, batches: Batches) -> _Layer:
    if site.spec is None:
        raise ContractError(f"{site.name} has no 2-D geometry")
    conv = original.get_submodule(site.name)
    kernel = layer_kernel(conv).cpu()
    bias = getattr(conv, "bias", None)
    anchor = anchor_of(original, site, batches)
    slopes = torch.ones(len(kernel), dtype=torch.float64) if anchor is None else anchor.slopes.cpu()
    return _Layer(
        site=site,
        spec=site.spec,
        kernel=(kernel.double() * slopes[:, None, None, None]).to(kernel.dtype),
        bias=torch.zeros_like(slopes) if bias is None else bias.detach().cpu().double() * slopes,
        slopes=slopes,
        module_class=chain_class(conv),
    )


@dataclass(frozen=True, slots=True)
class _Sums:
    """Sums over window patches and the layer's outputs: three quarters of the images, the rest, and all."""

    fit: LeastSquaresSums
    held_out: LeastSquaresSums
    total: LeastSquaresSums


def _window_sums(layer: _Layer, original: nn.Module, batches: Batches) -> _Sums:
    """One pass over the images, which stops when it has seen enough."""
    window = layer.spec.as_factor()
    dense = layer.module_class(ChainSum((Chain((window,)),)), layer.spec, bias=False)
    fit, held_out = (LeastSquaresSums(window.groups, layer.features, len(layer.kernel) // window.groups) for _ in "ab")
    calls = layer.site.calls
    wanted = max(_LEAST_POSITIONS, _POSITIONS_PER_FEATURE * layer.features)
    per_image = sum(call.output_shape[0] * math.prod(call.output_shape[2:]) for call in calls)
    share = min(1.0, wanted / (_ENOUGH_IMAGES * max(per_image, 1)))
    generator = torch.Generator().manual_seed(0)
    images = 0
    for batch in batches():
        if images >= _ENOUGH_IMAGES and fit.positions + held_out.positions >= wanted:
            break
        is_held_out = held_out_images(images, len(batch))
        images += len(batch)
        for x in run_until(original, layer.site.name, batch, calls=len(calls), needs_outputs=False).inputs:
            rows = held_out_rows(is_held_out, x).to(x.device)
            for sums, part in ((fit, x[~rows]), (held_out, x[rows])):
                if len(part):
                    _add_positions(sums, patches(dense.pad(part), window), share, generator)
    if not images:
        raise ContractError("no calibration images")
    for sums in (fit, held_out):
        _set_targets(sums, layer)
    return _Sums(fit, held_out, fit + held_out)


def _add_positions(sums: LeastSquaresSums, columns: Tensor, share: float, generator: torch.Generator) -> None:
    """Add a share of the positions of (G, n, P) patches, drawn at random; their outputs are known without them."""
    if share < 1:
        count = math.ceil(share * columns.shape[2])
        columns = columns[:, :, torch.randperm(columns.shape[2], generator=generator)[:count].to(columns.device)]
    columns = columns.to(torch.promote_types(columns.dtype, torch.float32))
    extended = F.pad(columns, (0, 0, 0, 1), value=1.0)
    sums.gram += (extended @ extended.mT).double().cpu()
    sums.positions += columns.shape[2]
    sums.precision = max(sums.precision, torch.finfo(columns.dtype).eps)


def _set_targets(sums: LeastSquaresSums, layer: _Layer) -> None:
    """What the sums lack: their products with the layer's outputs, which are linear in the patches."""
    if not bool(torch.isfinite(sums.gram).all()):
        raise UnsupportedModelError(not_finite(layer.site))
    solution = layer.solution(layer.kernel)
    sums.cross = sums.gram @ solution
    sums.target_energy = float((solution * sums.cross).sum())


def _transfer(layer: _Layer, candidate: Candidate, sums: _Sums) -> ChainConv2d:
    """A form fitted in the layer's units: closed form, the last factors solved for, all factors refined."""
    module = _whitened(layer, candidate, sums.total)
    last_map = _map_to_last_factors(module)
    fit, held_out, total = (_mapped(part, last_map, module) for part in (sums.fit, sums.held_out, sums.total))
    set_last_factors(module, best_solution(fit, held_out, total, last_factors_as_matrix(module)))
    if _is_closed_form_best(candidate, layer.spec):
        return module
    if layer.features <= _MAX_ROUNDS_FEATURES:
        refine_factors(module, sums.fit, sums.held_out)
    else:
        groups, features, outputs = sums.total.cross.shape
        refine_factors(module, sums.total, LeastSquaresSums(groups, features - 1, outputs))
    return module


def _is_closed_form_best(candidate: Candidate, spec: ConvSpec) -> bool:
    """Whether nothing is left to refine: a single factor, or two of which the first reads whole windows."""
    (term, *others) = candidate.form.terms
    first = term.factors[0]
    reads_all = (first.kernel_size, first.groups) == (spec.kernel_size, spec.groups)
    return not others and (len(term.factors) == 1 or (len(term.factors) == 2 and reads_all))


def _whitened(layer: _Layer, candidate: Candidate, sums: LeastSquaresSums) -> ChainConv2d:
    first = candidate.form.terms[0].factors[0]
    return layer.module(candidate, _first_moments(sums.gram[:, :-1, :-1], layer.spec, first))


def _first_moments(gram: Tensor, spec: ConvSpec, first: Factor) -> Tensor:
    """Second moments of what a form's first factor reads, (g, m, m), from those of the window patches, (G, n, n).

    A kernel smaller than the window reads it at several places, whose moments are added up.
    """
    groups = len(gram)
    channels = spec.in_channels // groups
    (window_height, window_width), (height, width) = spec.kernel_size, first.kernel_size
    taps = height * width
    full = gram.reshape(groups, channels, window_height, window_width, channels, window_height, window_width)
    shifts = [(y, x) for y in range(window_height - height + 1) for x in range(window_width - width + 1)]
    seen = [full[:, :, y : y + height, x : x + width, :, y : y + height, x : x + width] for y, x in shifts]
    blocks = sum(seen[1:], seen[0]).reshape(groups, channels, taps, channels, taps)
    own = []
    per_group = first.groups // groups
    index = torch.arange(per_group)
    for group, block in enumerate(blocks):
        sizes = first.in_groups[group * per_group : (group + 1) * per_group]
        rows = split_groups(block, sizes)  # (g, m, taps, channels, taps)
        both = split_groups(rows.movedim(3, 0), sizes)  # (g, m, g, m, taps, taps): columns first
        diagonal = both[index, :, index].permute(0, 2, 3, 1, 4)
        own.append(diagonal.reshape(per_group, diagonal.shape[1] * taps, -1))
    return torch.cat(own)


def _map_to_last_factors(module: ChainConv2d) -> Tensor:
    """What the last factors of all terms read as a linear function of the window patch, (g, m, n) float64.

    g are the last factors' groups; n is the patch of the one of the layer's groups that each of them belongs to.
    """
    terms = []
    for weights, chain in zip(module.factor_weights(), module.form.terms, strict=True):
        last = chain.factors[-1]
        if len(weights) > 1:
            inner = compose_chain([weight.double() for weight in weights[:-1]], Chain(chain.stages[:-1]))
        else:
            inner = torch.eye(chain.in_channels, dtype=torch.float64)[:, :, None, None]
        channels, inputs, height, width = inner.shape
        rows, columns = last.kernel_size
        placed = inner.new_zeros(channels, rows, columns, inputs, *module.kernel_size)
        for y in range(rows):
            for x in range(columns):
                placed[:, y, x, :, y : y + height, x : x + width] = inner
        by_group = split_groups(placed.reshape(channels, rows * columns, module.groups, -1), last.in_groups)
        index = torch.arange(last.groups)
        terms.append(by_group[index, :, :, index // (last.groups // module.groups)].flatten(1, 2))
    return torch.cat(terms, dim=1)


def _mapped(sums: LeastSquaresSums, last_map: Tensor, module: ChainConv2d) -> LeastSquaresSums:
    """Sums over window patches as sums over what the last factors read."""
    groups, features, inputs = last_map.shape
    extended = last_map.new_zeros(groups, features + 1, inputs + 1)
    extended[:, :-1, :-1] = last_map
    extended[:, -1, -1] = 1
    gram = sums.gram if len(sums.gram) == 1 else sums.gram.repeat_interleave(groups // len(sums.gram), 0)
    out_groups = module.form.terms[0].factors[-1].out_groups
    cross = split_groups(sums.cross.mT.flatten(0, 1), out_groups).mT
    mapped = LeastSquaresSums(groups, features, max(out_groups))
    mapped.gram = extended @ gram @ extended.mT
    mapped.cross = extended @ cross
    mapped.target_energy, mapped.positions, mapped.precision = sums.target_energy, sums.positions, sums.precision
    return mapped


def _wide_transfers(
    layer: _Layer, original: nn.Module, candidates: Sequence[Candidate], batches: Batches
) -> Iterator[ChainConv2d]:
    """Forms of a layer whose window moments would be too large: closed form, then the last factors, as read."""
    shells = [layer.module_class(c.form, layer.spec, bias=True, dtype=layer.kernel.dtype) for c in candidates]
    moments = input_moments(shells, original, layer.site, batches)
    modules = [
        layer.module(candidate, None if m is None else m.cpu())
        for candidate, m in zip(candidates, moments, strict=True)
    ]
    while modules:
        count, size = 0, 0
        while count < len(modules) and (not count or size + _sum_bytes(modules[count]) <= _SUM_BYTES):
            size += _sum_bytes(modules[count])
            count += 1
        part, modules = modules[:count], modules[count:]
        _solve_last_factors(part, layer, original, batches)
        yield from part


def _sum_bytes(module: ChainConv2d) -> int:
    """Of the sums for a module's last factors, on both sets of images and together."""
    groups, features, _ = last_factors_as_matrix(module).shape
    return 3 * 8 * groups * features**2


def _solve_last_factors(modules: list[ChainConv2d], layer: _Layer, original: nn.Module, batches: Batches) -> None:
    """Least squares of the last factors of several forms, in one pass over the images, in place."""
    priors = [last_factors_as_matrix(module) for module in modules]
    sums = [[LeastSquaresSums(len(p), p.shape[1] - 1, p.shape[2]) for _ in "ab"] for p in priors]
    slopes = layer.slopes[:, None, None].to(layer.kernel.dtype)
    calls = len(layer.site.calls)
    images = 0
    for batch in batches():
        is_held_out = held_out_images(images, len(batch))
        images += len(batch)
        seen = run_until(original, layer.site.name, batch, calls=calls, needs_outputs=True)
        for x, y in zip(seen.inputs, seen.outputs, strict=True):
            x, targets = x.cpu().to(layer.kernel.dtype), y.cpu().to(layer.kernel.dtype) * slopes
            rows = held_out_rows(is_held_out, x)
            for module, both in zip(modules, sums, strict=True):
                out_groups = module.form.terms[0].factors[-1].out_groups
                for part, own in ((~rows, both[0]), (rows, both[1])):
                    if len(x[part]):
                        own.add(last_factor_columns(module, x[part]), grouped_outputs(targets[part], out_groups))
        if images >= _ENOUGH_IMAGES and min(fit.positions for fit, _ in sums) >= _LEAST_POSITIONS:
            break
    for module, prior, (fit, held_out) in zip(modules, priors, sums, strict=True):
        total = fit + held_out
        if not math.isfinite(total.target_energy) or not bool(torch.isfinite(total.gram).all()):
            raise UnsupportedModelError(not_finite(layer.site))
        set_last_factors(module, best_solution(fit, held_out, total, prior))
