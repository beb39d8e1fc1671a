"""`ChainConv2d`: the one module that runs any sum of chains in place of an nn.Conv2d."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Self

import torch
import torch.nn.functional as F  # noqa: N812 (PyTorch's own convention)
from torch import Tensor, nn

from sepdeploy.core.chain import Chain, ChainSum, Factor, Towers
from sepdeploy.core.conv import ConvSpec
from sepdeploy.errors import ContractError, UsageError
from sepdeploy.schemes.kernels import compose_kernels
from sepdeploy.schemes.scheme import FactorWeights
from sepdeploy.schemes.stage_modules import (
    FactorModule,
    ParallelTowers,
    UnevenConv2d,
    chain_modules,
    chain_pairs,
)
from sepdeploy.schemes.weighted import WeightedChain, WeightedStage, WeightedSum, form_of

__all__ = ["ChainConv2d", "ChainLinear", "batchnorm_affine", "chain_class", "layer_kernel", "read_weight"]


class ChainConv2d(nn.Module):
    """A convolution written as a sum of chains of grouped convolutions.

    It has the attributes of the nn.Conv2d that it replaces (`in_channels`, `kernel_size`, `stride`, ...), so that
    networks which look at them keep working; `weight` is the equivalent dense kernel, computed when read.
    The factors are plain nn.Conv2d modules, which optimizers, quantizers and exporters know. The bias sits on the last
    factor of the first term, all the others have none: between linear stages it would be redundant.

    Args:
        form: The chains.
        spec: Geometry of the convolution that it replaces.
        bias: Whether to add a bias to the form's output, whatever `spec` says: transfer may need one where the
            original had none. A form that has one already keeps it.
        dtype: Type of the weights.
    """

    def __init__(self, form: ChainSum, spec: ConvSpec, *, bias: bool, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.form = form.with_output_bias() if bias else form
        self.spec = spec
        self.in_channels = spec.in_channels
        self.out_channels = spec.out_channels
        self.kernel_size = spec.kernel_size
        self.stride = spec.stride
        self.padding = (spec.padding[0], spec.padding[2])
        self.dilation = spec.dilation
        self.groups = spec.groups
        self.padding_mode = spec.padding_mode
        self.terms = nn.ModuleList(nn.Sequential(*chain_modules(chain, dtype)) for chain in self.form.terms)

    def forward(self, input: Tensor) -> Tensor:
        """Convolve `input` (N, C, H, W) or (C, H, W); named as nn.Conv2d names it, for calls by keyword."""
        x = self.pad(input)
        out: Tensor = self.terms[0](x)
        for term in self.terms[1:]:
            out = out + term(x)
        return out

    def pad(self, x: Tensor) -> Tensor:
        """Apply a padding mode other than zeros, which no factor does itself."""
        if self.padding_mode == "zeros":
            return x
        top, bottom, left, right = self.spec.padding
        return F.pad(x, (left, right, top, bottom), mode=self.padding_mode)

    def factor_modules(self) -> list[list[FactorModule]]:
        """The module of each factor, per term, in order."""
        return [
            [_factor_module(module) for stage, module in _leaf_pairs(chain, term) if isinstance(stage, Factor)]
            for chain, term in zip(self.form.terms, self.terms, strict=True)
        ]

    def factor_weights(self) -> FactorWeights:
        """Kernels (O, in_per_group, Kh, Kw) per term and factor, attached to the parameters."""
        return tuple(
            tuple(read_weight(module, factor) for module, factor in zip(modules, chain.factors, strict=True))
            for modules, chain in zip(self.factor_modules(), self.form.terms, strict=True)
        )

    @property
    def bias(self) -> Tensor | None:
        """The bias (O,), None if there is none."""
        last = self._last_modules()[0].bias
        return None if last is None else last[: self.out_channels]

    def _last_modules(self) -> list[FactorModule]:
        """The module of each term's last factor.

        Raises:
            UsageError: if a term ends in something else, as lowered ones may.
        """
        if not all(isinstance(chain.stages[-1], Factor) for chain in self.form.terms):
            raise UsageError("a form whose terms do not all end in a convolution has no place for a bias or a scale")
        return [modules[-1] for modules in self.factor_modules()]

    @property
    def weight(self) -> Tensor:
        """The equivalent dense kernel (O, I / groups, Kh, Kw); computed anew on each access, not a parameter.

        Raises:
            AttributeError: if the form has norms or activations, so that there is none: hasattr() then says so.
        """
        try:
            return compose_kernels(self.factor_weights(), self.form, self.groups)
        except UsageError as error:
            raise AttributeError(str(error)) from error

    @torch.no_grad()
    def set_weights(self, weights: FactorWeights, bias: Tensor | None = None) -> None:
        """Copy factor weights, per term and factor, and the bias (O,) into the module; None is a bias of zeros.

        Raises:
            UsageError: if there is a bias but the module was made without one.
        """
        for modules, values in zip(self.factor_modules(), weights, strict=True):
            for module, value in zip(modules, values, strict=True):
                _write_weight(module, value)
        if self.bias is not None:
            self.set_bias(torch.zeros(self.out_channels) if bias is None else bias)
        elif bias is not None:
            raise UsageError("this ChainConv2d was made without a bias")

    @torch.no_grad()
    def set_bias(self, bias: Tensor) -> None:
        """Set the bias (O,), whether there was one or not."""
        _write_bias(self._last_modules()[0], bias)
        self.form = self.form.with_output_bias()

    @torch.no_grad()
    def scale_outputs(self, scale: Tensor, shift: Tensor) -> None:
        """Fold y -> scale * y + shift, (O,) each, into the last factors and the bias, in float64."""
        old = self.bias
        for module, weights in zip(self._last_modules(), self.factor_weights(), strict=True):
            _write_weight(module, weights[-1].double() * scale.double()[:, None, None, None])
        self.set_bias(shift if old is None else old.double() * scale + shift)

    def weighted(self) -> WeightedSum:
        """The terms with copies of their weights."""
        return tuple(_weighted(chain, term) for chain, term in zip(self.form.terms, self.terms, strict=True))

    @classmethod
    def from_weighted(cls, terms: WeightedSum, spec: ConvSpec, *, dtype: torch.dtype = torch.float32) -> Self:
        """The module that runs `terms` in place of a convolution of geometry `spec`, in eval mode."""
        module = cls(form_of(terms), spec, bias=False, dtype=dtype)
        for values, chain, term in zip(terms, module.form.terms, module.terms, strict=True):
            _write(values, chain, term)
        return module.eval()

    def extra_repr(self) -> str:
        """Geometry, for print(model)."""
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}, "
            f"terms={len(self.form.terms)}"
        )


class ChainLinear(ChainConv2d):
    """A linear layer written as a sum of chains of 1x1 convolutions; takes (..., in_features), as nn.Linear does."""

    def __init__(self, form: ChainSum, spec: ConvSpec, *, bias: bool, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(form, spec, bias=bias, dtype=dtype)
        self.in_features = spec.in_channels
        self.out_features = spec.out_channels

    def forward(self, input: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        out = super().forward(input.reshape(-1, self.in_features, 1, 1))
        return out.reshape(*input.shape[:-1], self.out_features)

    @property
    def weight(self) -> Tensor:
        """The equivalent matrix (out_features, in_features); computed anew on each access, not a parameter."""
        return super().weight[:, :, 0, 0]


def chain_class(layer: nn.Module) -> type[ChainConv2d]:
    """What takes the place of an nn.Conv2d or nn.Linear, or of chains that do so already."""
    return ChainLinear if isinstance(layer, nn.Linear | ChainLinear) else ChainConv2d


def layer_kernel(layer: nn.Module) -> Tensor:
    """The kernel (O, I / groups, Kh, Kw) of an nn.Conv2d, or of an nn.Linear as a 1x1 convolution.

    Raises:
        ContractError: if it is neither.
    """
    if isinstance(layer, nn.Linear):
        return layer.weight.detach()[:, :, None, None]
    if isinstance(layer, nn.Conv2d):
        return layer.weight.detach()
    raise ContractError(f"a {type(layer).__name__} is neither an nn.Conv2d nor an nn.Linear")


def read_weight(module: FactorModule, factor: Factor) -> Tensor:
    """The kernel (O, in_per_group, Kh, Kw) of a factor's module; filling beyond its channels is cut off."""
    return module.weight[: factor.out_channels]


def _leaf_pairs(chain: Chain, modules: nn.Module) -> Iterator[tuple[object, nn.Module]]:
    """Stages and their modules, those of towers branch by branch, as `Chain.leaves` orders them."""
    for stage, module in chain_pairs(chain, modules):
        if isinstance(stage, Towers) and isinstance(module, ParallelTowers):
            for branch, branch_modules in zip(stage.branches, module.branches, strict=True):
                yield from _leaf_pairs(branch, branch_modules)
        else:
            yield stage, module


def _factor_module(module: nn.Module) -> FactorModule:
    if not isinstance(module, nn.Conv2d | UnevenConv2d):
        raise ContractError(f"a factor runs as {type(module).__name__}")
    return module


@torch.no_grad()
def _write_weight(module: FactorModule, weight: Tensor) -> None:
    if isinstance(module, UnevenConv2d):
        module.set_weight(weight)
    else:
        module.weight[: len(weight)].copy_(weight)  # maybe onto itself
        module.weight[len(weight) :].zero_()


@torch.no_grad()
def _write_bias(module: FactorModule, bias: Tensor) -> None:
    if isinstance(module, UnevenConv2d):
        module.set_bias(bias)
    else:
        filled = F.pad(bias.detach(), (0, module.out_channels - len(bias))).to(module.weight.dtype)
        if module.bias is None:
            module.bias = nn.Parameter(filled.clone())
        else:
            module.bias.copy_(filled)


def _weighted(chain: Chain, modules: nn.Module) -> WeightedChain:
    items = []
    for stage, module in chain_pairs(chain, modules):
        if isinstance(module, nn.Identity):
            continue  # a norm that is folded already
        weight = bias = None
        branches: tuple[WeightedChain, ...] = ()
        if isinstance(stage, Factor):
            own = _factor_module(module)
            weight = read_weight(own, stage).detach().clone()
            bias = None if own.bias is None else own.bias[: stage.out_channels].detach().clone()
            stage = replace(stage, has_bias=bias is not None)  # folding a norm may have set one
        elif isinstance(module, nn.BatchNorm2d):
            weight, bias = batchnorm_affine(module)
        elif isinstance(stage, Towers) and isinstance(module, ParallelTowers):
            branches = tuple(_weighted(b, m) for b, m in zip(stage.branches, module.branches, strict=True))
        items.append(WeightedStage(stage, weight, bias, branches))
    return tuple(items)


@torch.no_grad()
def _write(values: WeightedChain, chain: Chain, modules: nn.Module) -> None:
    for item, (stage, module) in zip(values, chain_pairs(chain, modules), strict=True):
        if isinstance(module, nn.BatchNorm2d) and item.weight is not None and item.bias is not None:
            module.eps = 0.0  # with mean 0 and variance 1 the norm is just its affine part
            module.weight.copy_(item.weight)
            module.bias.copy_(item.bias)
        elif isinstance(stage, Towers) and isinstance(module, ParallelTowers):
            for branch, form, inner in zip(item.branches, stage.branches, module.branches, strict=True):
                _write(branch, form, inner)
        elif isinstance(stage, Factor) and item.weight is not None:
            _write_weight(_factor_module(module), item.weight)
            if item.bias is not None:
                _write_bias(_factor_module(module), item.bias)


def batchnorm_affine(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """Scale and shift (C,) in float64 that a batch norm of any class applies in eval mode.

    Raises:
        ContractError: if it has no running statistics.
    """
    mean, variance, weight, bias = (
        getattr(norm, name, None) for name in ("running_mean", "running_var", "weight", "bias")
    )
    if mean is None or variance is None:
        raise ContractError(f"{type(norm).__name__} is no batch norm with running statistics, and cannot be folded")
    scale = torch.rsqrt(variance.double() + float(norm.eps))  # type: ignore[arg-type]
    if weight is not None:
        scale = scale * weight.double()
    shift = -mean.double() * scale
    if bias is not None:
        shift = shift + bias.double()
    return scale, shift
