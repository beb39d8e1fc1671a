"""Each stage of a chain as an nn.Module, made of PyTorch layers that optimizers and exporters know."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 (PyTorch's own convention)
from torch import Tensor, nn

from sepdeploy.core.chain import Activation, Chain, Factor, Norm, Shuffle, Slice, Stage, Towers

__all__ = ["ChannelShuffle", "FactorModule", "PaddedConv2d", "UnevenConv2d", "chain_modules", "chain_pairs"]

_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "silu": nn.SiLU,
    "hardswish": nn.Hardswish,
}


class UnevenConv2d(nn.Module):
    """A grouped convolution whose groups do not divide the channels, without a wasted weight.

    Groups of equal size form ordinary grouped convolutions, three at most, whose outputs are concatenated.

    Args:
        factor: Its geometry.
        dtype: Type of the weights.
    """

    def __init__(self, factor: Factor, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.factor = factor
        self.runs = nn.ModuleList(
            _conv2d(factor, run.groups * run.in_per_group, run.groups * run.out_per_group, run.groups, dtype)
            for run in factor.runs
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) or (C, H, W)."""
        parts = torch.split(x, [run.in_channels for run in self._convs()], dim=-3)
        return torch.cat([conv(part) for conv, part in zip(self.runs, parts, strict=True)], dim=-3)

    @property
    def weight(self) -> Tensor:
        """The kernel (O, in_per_group of the largest group, Kh, Kw), a new tensor."""
        size = self.factor.in_per_group
        return torch.cat([F.pad(c.weight, (0, 0, 0, 0, 0, size - c.weight.shape[1])) for c in self._convs()])

    @property
    def bias(self) -> Tensor | None:
        """The bias (O,), a new tensor; None if there is none."""
        biases = [conv.bias for conv in self._convs() if conv.bias is not None]
        return torch.cat(biases) if biases else None

    @torch.no_grad()
    def set_weight(self, weight: Tensor) -> None:
        """Copy a kernel laid out as `weight`."""
        for conv, part in zip(self._convs(), torch.split(weight, self._sizes()), strict=True):
            conv.weight.copy_(part[:, : conv.weight.shape[1]])

    @torch.no_grad()
    def set_bias(self, bias: Tensor) -> None:
        """Set the bias (O,), with or without one before."""
        for conv, part in zip(self._convs(), torch.split(bias.detach(), self._sizes()), strict=True):
            if conv.bias is None:
                conv.bias = nn.Parameter(part.to(conv.weight.dtype).clone())
            else:
                conv.bias.copy_(part)

    def _sizes(self) -> list[int]:
        return [conv.out_channels for conv in self._convs()]

    def _convs(self) -> list[nn.Conv2d]:
        return [run for run in self.runs if isinstance(run, nn.Conv2d)]


class PaddedConv2d(nn.Conv2d):
    """A grouped convolution filled up with zero channels to groups of equal size; the surplus outputs are cut off.

    The way of the authors of "Optimized Separable Convolution"; it computes and stores what no output uses.

    Args:
        factor: Its geometry.
        dtype: Type of the weights.
    """

    def __init__(self, factor: Factor, dtype: torch.dtype = torch.float32) -> None:
        self.factor = factor
        (run,) = factor.runs
        super().__init__(
            run.groups * run.in_per_group,
            run.groups * run.out_per_group,
            factor.kernel_size,
            factor.stride,
            (factor.padding[0], factor.padding[2]) if _is_symmetric(factor) else 0,
            factor.dilation,
            run.groups,
            bias=factor.has_bias,
            dtype=dtype,
        )

    def forward(self, input: Tensor) -> Tensor:
        """Map (N, C, H, W) or (C, H, W)."""
        filled = F.pad(input, (0, 0, 0, 0, 0, self.in_channels - self.factor.in_channels))
        return super().forward(filled).narrow(-3, 0, self.factor.out_channels)


class ChannelShuffle(nn.Module):
    """A channel shuffle, written down in one of two ways that compute the same.

    Args:
        shuffle: Groups and formulation.
        channels: Channels of the input.
    """

    def __init__(self, shuffle: Shuffle, channels: int) -> None:
        super().__init__()
        self.shuffle = shuffle
        self.is_channels_last = shuffle.formulation == "channels_last" and channels % shuffle.groups == 0
        self.register_buffer("order", torch.tensor(shuffle.order(channels)), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) or (C, H, W)."""
        if not self.is_channels_last:
            return x.index_select(-3, self.order)  # type: ignore[arg-type]
        # Three-dimensional in between: runtimes that are channels-last make one RESHAPE, TRANSPOSE, RESHAPE of it.
        groups, channels = self.shuffle.groups, x.shape[-3]
        pixels = x.movedim(-3, -1)
        shuffled = pixels.reshape(-1, groups, channels // groups).transpose(1, 2)
        return shuffled.reshape(pixels.shape).movedim(-1, -3)

    def extra_repr(self) -> str:
        """Groups and formulation, for print(model)."""
        return f"groups={self.shuffle.groups}, {'channels_last' if self.is_channels_last else 'gather'}"


class ChannelSlice(nn.Module):
    """Some neighbouring channels.

    Args:
        stage: Which.
    """

    def __init__(self, stage: Slice) -> None:
        super().__init__()
        self.stage = stage

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) or (C, H, W)."""
        return x.narrow(-3, self.stage.start, self.stage.out_channels)

    def extra_repr(self) -> str:
        """The channels, for print(model)."""
        return f"{self.stage.start}:{self.stage.stop}"


class ParallelTowers(nn.Module):
    """Chains side by side on the same input, concatenated or added up.

    Args:
        towers: The chains.
        dtype: Type of the weights.
    """

    def __init__(self, towers: Towers, dtype: torch.dtype) -> None:
        super().__init__()
        self.join = towers.join
        self.branches = nn.ModuleList(nn.Sequential(*chain_modules(branch, dtype)) for branch in towers.branches)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, C, H, W) or (C, H, W)."""
        outputs: list[Tensor] = [branch(x) for branch in self.branches]
        if self.join == "concat":
            return torch.cat(outputs, dim=-3)
        total = outputs[0]
        for output in outputs[1:]:
            total = total + output
        return total


FactorModule = nn.Conv2d | UnevenConv2d
"""What runs a `Factor`."""


def chain_modules(chain: Chain, dtype: torch.dtype) -> list[nn.Module]:
    """The modules that run a chain, in order; a factor with asymmetric padding has an nn.ZeroPad2d before it."""
    modules: list[nn.Module] = []
    channels = chain.in_channels
    for stage in chain.stages:
        modules += _stage_modules(stage, channels, dtype)
        channels = getattr(stage, "out_channels", channels)
    return modules


def chain_pairs(chain: Chain, modules: nn.Module) -> list[tuple[Stage, nn.Module]]:
    """Each stage of a chain with the module that `chain_modules` made of it."""
    own = [module for module in modules.children() if not isinstance(module, nn.ZeroPad2d)]
    return list(zip(chain.stages, own, strict=True))


def _stage_modules(stage: Stage, channels: int, dtype: torch.dtype) -> list[nn.Module]:
    if isinstance(stage, Factor):
        return _factor_modules(stage, dtype)
    if isinstance(stage, Shuffle):
        return [ChannelShuffle(stage, channels)]
    if isinstance(stage, Norm):
        return [nn.BatchNorm2d(stage.channels, dtype=dtype)]
    if isinstance(stage, Activation):
        return [_ACTIVATIONS[stage.function]()]
    if isinstance(stage, Slice):
        return [ChannelSlice(stage)]
    return [ParallelTowers(stage, dtype)]


def _factor_modules(factor: Factor, dtype: torch.dtype) -> list[nn.Module]:
    conv: nn.Module
    if factor.is_even:
        conv = _conv2d(factor, factor.in_channels, factor.out_channels, factor.groups, dtype)
    else:
        conv = PaddedConv2d(factor, dtype) if factor.pads_groups else UnevenConv2d(factor, dtype)
    top, bottom, left, right = factor.padding
    return [conv] if _is_symmetric(factor) else [nn.ZeroPad2d((left, right, top, bottom)), conv]


def _is_symmetric(factor: Factor) -> bool:
    top, bottom, left, right = factor.padding
    return top == bottom and left == right


def _conv2d(factor: Factor, in_channels: int, out_channels: int, groups: int, dtype: torch.dtype) -> nn.Conv2d:
    return nn.Conv2d(
        in_channels,
        out_channels,
        factor.kernel_size,
        stride=factor.stride,
        padding=(factor.padding[0], factor.padding[2]) if _is_symmetric(factor) else 0,
        dilation=factor.dilation,
        groups=groups,
        bias=factor.has_bias,
        dtype=dtype,
    )
