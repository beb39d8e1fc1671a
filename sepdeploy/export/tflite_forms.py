"""Operators written down as litert-torch 0.10 and TFLite can take them: the same function in other words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

__all__ = ["TfliteForms"]

Pair = tuple[int, int]


class TfliteForms(TorchFunctionMode):
    """While it is active, some calls compute the same in a way that can be exported."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """What `func` returns."""
        form, named = _FORMS.get(func), dict(kwargs or {})
        if form is None or named.keys() & {"out", "self"}:
            return func(*args, **named)
        if "input" in named:
            args = (named.pop("input"), *args)
        return form(*args, **named)


def _cropped(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Pair = 1,
    padding: int | Pair = 0,
    output_padding: int | Pair = 0,
    groups: int = 1,
    dilation: int | Pair = 1,
) -> Tensor:
    """A transposed convolution, computed whole and cropped where TFLite has no padding for it.

    TRANSPOSE_CONV knows no padding, and one, the same on both sides, that makes the output `stride` times as large as
    the input. litert-torch fails at others, such as the usual 3x3 with stride 2, padding 1 and output padding 1, and
    fills what an output padding adds with zeros, where PyTorch has values that were computed.
    """
    strides, paddings, extras, dilations = (_pair(each) for each in (stride, padding, output_padding, dilation))
    reach = [d * (k - 1) + 1 for d, k in zip(dilations, weight.shape[2:], strict=True)]
    is_same = not any(extras) and all(r - s == 2 * p for r, s, p in zip(reach, strides, paddings, strict=True))
    if max(strides) == 1 or not any(paddings) or is_same or any(e > p for e, p in zip(extras, paddings, strict=True)):
        return torch.conv_transpose2d(x, weight, bias, strides, paddings, extras, groups, dilations)
    whole = torch.conv_transpose2d(x, weight, bias, strides, 0, 0, groups, dilations)
    (top, left), (below, right) = paddings, extras
    return functional.pad(whole, (-left, right - left, -top, below - top))


def _pair(value: int | Pair) -> Pair:
    if isinstance(value, int):
        return value, value
    return (value[0], value[-1])


def _power(x: Tensor | float, exponent: Tensor | float) -> Tensor:
    """Squares as products: POW takes no tensors of five dimensions, and runtimes have no int8 kernel for it."""
    if isinstance(x, Tensor) and x.is_floating_point() and isinstance(exponent, int | float) and exponent == 2:
        return x * x
    return torch.pow(x, exponent)  # type: ignore[arg-type]


# Below, exponentials and logarithms are taken of small values: of large ones they would take up the range that 8 bits
# can tell apart. LiteRT's int8 kernel of a ReLU that is not fused takes 3 times as long as the rest of an activation.


def _elu(x: Tensor, alpha: float = 1.0, inplace: bool = False) -> Tensor:
    negative = (torch.exp(x.clamp(max=0.0)) - 1.0) * alpha
    return _given(x, torch.maximum(x, negative) if alpha <= 1 else _positive(x) + negative, inplace)


def _celu(x: Tensor, alpha: float = 1.0, inplace: bool = False) -> Tensor:
    if alpha <= 0:
        return functional.celu(x, alpha, inplace)
    return _given(x, torch.maximum(x, (torch.exp(x.clamp(max=0.0) / alpha) - 1.0) * alpha), inplace)


def _selu(x: Tensor, inplace: bool = False) -> Tensor:
    return _given(x, _elu(x, 1.6732632423543772) * 1.0507009873554805, inplace)  # PyTorch's own constants


def _positive(x: Tensor) -> Tensor:
    return x - x.clamp(max=0.0)


def _softplus(x: Tensor, beta: float = 1.0, threshold: float = 20.0) -> Tensor:
    """As relu(x) - log(sigmoid(|x|)); litert-torch takes the logarithm of 1 + exp(x)."""
    if threshold < 15 or beta <= 0:  # beyond it PyTorch returns x, which is another function then
        return functional.softplus(x, beta, threshold)
    return _positive(x) - torch.log(torch.sigmoid((x * beta).abs())) / beta


def _mish(x: Tensor, inplace: bool = False) -> Tensor:
    return _given(x, x * torch.tanh(_softplus(x)), inplace)


def _given(x: Tensor, result: Tensor, inplace: bool) -> Tensor:
    return x.copy_(result) if inplace else result


def _nearest(
    x: Tensor,
    size: int | Pair | None = None,
    scale_factor: float | tuple[float, ...] | None = None,
    mode: str = "nearest",
    align_corners: bool | None = None,
    recompute_scale_factor: bool | None = None,
    antialias: bool = False,
) -> Tensor:
    """Nearest neighbours at a ratio that is no whole number are picked: TFLite's operator would take others."""
    same = functional.interpolate(x, size, scale_factor, mode, align_corners, recompute_scale_factor, antialias)
    if mode != "nearest" or x.dim() != 4:
        return same
    factors: tuple[float | None, ...] = (None, None)
    if size is None and not recompute_scale_factor and scale_factor is not None:
        factors = scale_factor if isinstance(scale_factor, tuple | list) else (scale_factor, scale_factor)
    is_small = sum(same.shape[2:]) <= 128  # PyTorch then has a kernel of its own, which computes its factors
    picks = []
    for axis, factor in enumerate(factors, 2):
        before, after = x.shape[axis], same.shape[axis]
        is_known = factor is None or (is_small and after in (before, 2 * before))
        step = before / after if is_known else 1 / factor  # type: ignore[operator]
        picks.append([min(int(np.float32(i) * np.float32(step)), before - 1) for i in range(after)])
    sizes = list(zip(x.shape[2:], same.shape[2:], picks, strict=True))
    if all(m % n == 0 and picked == [i * n // m for i in range(m)] for n, m, picked in sizes):
        return same
    for axis, (before, _, picked) in enumerate(sizes, 2):
        if picked != list(range(before)):
            x = x.index_select(axis, torch.tensor(picked))
    return x


def _average(
    x: Tensor,
    kernel_size: int | Pair,
    stride: int | Pair | None = None,
    padding: int | Pair = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """Averages without the padding are those with it, times a constant: else they may be a loop that stays in float."""
    pairs = [_pair(each) for each in (kernel_size, stride or kernel_size, padding)]
    is_written = not ceil_mode and all(map(_is_same, x.shape[-2:], *pairs))
    if x.dim() != 4 or count_include_pad or divisor_override is not None or is_written:
        return functional.avg_pool2d(
            x, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override=divisor_override
        )
    result = functional.avg_pool2d(x, kernel_size, stride, padding, ceil_mode)
    if not any(pairs[2]):
        return result
    ratios = []
    for kernel, step, padded, before, after in zip(*pairs, x.shape[-2:], result.shape[-2:], strict=True):
        starts = [i * step - padded for i in range(after)]
        ratios.append([(min(s + kernel, before + padded) - s) / (min(s + kernel, before) - max(s, 0)) for s in starts])
    return result * torch.tensor([[row * column for column in ratios[1]] for row in ratios[0]], dtype=x.dtype)


def _is_same(size: int, kernel: int, stride: int, padding: int) -> bool:
    """Whether TFLite's padding SAME is this one; litert-torch then writes one operator."""
    needed = max(0, (-(-size // stride) - 1) * stride + kernel - size)
    return needed == 2 * padding


def _largest(x: Tensor, output_size: int | tuple[int | None, int | None], return_indices: bool = False) -> Any:
    """Adaptive maxima, which litert-torch does not know, by the rows and then the columns of each window."""
    if return_indices:
        return functional.adaptive_max_pool2d(x, output_size, True)  # type: ignore[call-overload]
    wanted = (output_size,) * 2 if isinstance(output_size, int) else tuple(output_size)
    sizes = [n if m is None else m for n, m in zip(x.shape[-2:], wanted, strict=True)]
    if all(n % m == 0 for n, m in zip(x.shape[-2:], sizes, strict=True)):
        return functional.max_pool2d(x, [n // m for n, m in zip(x.shape[-2:], sizes, strict=True)])
    for axis, after in zip((-2, -1), sizes, strict=True):
        before = x.shape[axis]
        ends = [(i * before // after, -(-(i + 1) * before // after)) for i in range(after)]
        x = torch.cat([x.narrow(axis, start, end - start).amax(axis, keepdim=True) for start, end in ends], axis)
    return x


def _normalized(x: Tensor, size: int, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0) -> Tensor:
    """Local response normalization, whose sums over neighbouring channels are a 1x1 convolution."""
    if x.dim() != 4:
        return functional.local_response_norm(x, size, alpha, beta, k)
    channels = range(x.shape[1])
    near = [[alpha / size if -(size // 2) <= j - i <= (size - 1) // 2 else 0.0 for j in channels] for i in channels]
    sums = functional.conv2d(
        x * x,
        torch.tensor(near, dtype=x.dtype)[:, :, None, None],
        torch.full((len(channels),), float(k), dtype=x.dtype),
    )
    return x / sums**beta


_FORMS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.conv_transpose2d: _cropped,
    functional.interpolate: _nearest,
    functional.avg_pool2d: _average,
    functional.adaptive_max_pool2d: _largest,
    functional.local_response_norm: _normalized,
    torch.pow: _power,
    Tensor.pow: _power,
    Tensor.__pow__: _power,
    functional.elu: _elu,
    functional.celu: _celu,
    functional.selu: _selu,
    functional.softplus: _softplus,
    functional.mish: _mish,
}
