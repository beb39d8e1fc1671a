"""Every call that is put in other words computes what PyTorch computes, however it is written."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from sepdeploy.export.tflite_forms import TfliteForms

X = torch.linspace(-4, 4, 2 * 3 * 9 * 10).reshape(2, 3, 9, 10).sin() * 5
WEIGHT = torch.linspace(-1, 1, 3 * 4 * 3 * 2).cos().reshape(3, 4, 3, 2)

CALLS = {
    "input by name": lambda x: (
        F.avg_pool2d(input=x, kernel_size=2, padding=1, count_include_pad=False),
        F.conv_transpose2d(input=x, weight=WEIGHT, stride=2, padding=1, output_padding=1),
        F.softplus(input=x),
        torch.pow(input=x, exponent=2),
        F.interpolate(input=x, scale_factor=1.3),
        F.adaptive_max_pool2d(input=x, output_size=4),
    ),
    "results that are given": lambda x: torch.pow(x, 2, out=torch.empty_like(x)),
    "squares": lambda x: (x**2, x.pow(2.0), x**3, 2.0 ** x[0], x ** torch.tensor(2), x**2j),
    "squares of other types": lambda x: (x.int() ** 2.0, (x > 0) ** 2, x.int() ** 2, x.double() ** 2, x.half() ** 2),
    "ELU": lambda x: tuple(F.elu(x, alpha) for alpha in (1.0, 0.3, 2.0, -1.0)),
    "CELU": lambda x: tuple(F.celu(x, alpha) for alpha in (1.0, 0.3, 2.0, -1.0)),
    "SELU and Mish": lambda x: (F.selu(x), F.mish(x), torch.selu(x), nn.Mish()(x[0, 0, 0, 0])),
    "softplus": lambda x: tuple(F.softplus(x, beta, limit) for beta in (1, 2.5, -1.0) for limit in (20, 3)),
    "in place": lambda x: tuple(f(x.clone(), inplace=True) for f in (F.elu, F.celu, F.selu, F.mish)),
    "local responses": lambda x: (
        F.local_response_norm(x, 2, 0.5), F.local_response_norm(x.double(), 3), F.local_response_norm(x[0], 2),
    ),
    "maxima": lambda x: (
        *(F.adaptive_max_pool2d(y, size) for y in (x, x[0]) for size in (1, 3, (None, 5), (4, 7), [9, 2])),
        *F.adaptive_max_pool2d(x, 3, return_indices=True),
    ),
    "other interpolations": lambda x: (
        F.interpolate(x, scale_factor=1.5, mode="bilinear"), F.interpolate(x, (5, 5), mode="area"),
        F.interpolate(x[0], scale_factor=1.5), F.interpolate(x[None], scale_factor=2), nn.Upsample(scale_factor=2)(x),
    ),
}  # fmt: skip


def same(found: object, expected: object) -> None:
    for a, b in zip(*(each if isinstance(each, tuple) else (each,) for each in (found, expected)), strict=True):
        assert isinstance(a, Tensor)
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", CALLS)
def test_calls(name: str) -> None:
    with TfliteForms():
        found = CALLS[name](X)
    same(found, CALLS[name](X))


@pytest.mark.parametrize("includes", [True, False])
def test_averages(includes: bool) -> None:
    for kernel, stride, padding, ceil, size in itertools.product(
        (2, 3, (3, 2)), (None, 1, 2, (2, 1)), (0, 1, (1, 0)), (True, False), ((9, 10), (8, 7))
    ):
        x = X[:, :, : size[0], : size[1]]
        for given, divisor in ((x, None), (x[0], None), (x, 5)):
            options = (kernel, stride, padding, ceil, includes, divisor)
            with TfliteForms():
                found = F.avg_pool2d(given, *options)
            same(found, F.avg_pool2d(given, *options))


def test_transposed_convolutions() -> None:
    for stride, padding, extra, groups in itertools.product((1, 2, (2, 3)), (0, 1, (1, 0)), (0, 1), (1, 3)):
        weight = WEIGHT if groups == 1 else WEIGHT[:, :2]
        for given in (X, X[0]):
            options = (weight, None, stride, padding, extra, groups)
            try:
                expected = F.conv_transpose2d(given, *options)
            except RuntimeError:  # an output padding has to be smaller than the stride
                continue
            with TfliteForms():
                same(F.conv_transpose2d(given, *options), expected)


def test_nearest_neighbours() -> None:
    """PyTorch has two kernels, which take other factors for what stays or doubles in small images."""
    large = X.repeat(1, 1, 8, 8)
    for given in (X, X[:, :, :, :5], large):
        for factor in (2, 1.1, 0.5, 3.05, 1.01, 0.34, 2.0, (2, 1), (1.1, 2.05), (0.7, 3.0), (1, 1)):
            with TfliteForms():
                found = F.interpolate(given, scale_factor=factor)
            same(found, F.interpolate(given, scale_factor=factor))
        for size in (7, (18, 20), (9, 10), (5, 31), (144, 160)):
            with TfliteForms():
                found = F.interpolate(given, size=size)
            same(found, F.interpolate(given, size=size))
