"""Forms with random weights, and what every lowering of them must keep."""

import pytest
import torch
from torch import nn

from sepdeploy.core.chain import Chain, ChainSum
from sepdeploy.core.conv import ConvSpec
from sepdeploy.schemes.lowerings.lowering import find_lowering
from sepdeploy.schemes.module import ChainConv2d
from sepdeploy.schemes.weighted import form_of

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}  # rounding of the same products in another order


def as_sum(*stages):
    return ChainSum((Chain(stages),))


@pytest.fixture
def make():
    """A module of the form in float64, every factor with a bias that its form has, norms in eval mode."""

    def build(form, dtype=torch.float64, *, bias=False):
        torch.manual_seed(0)
        spec = ConvSpec(form.in_channels, form.out_channels, (3, 3))
        module = ChainConv2d(form, spec, bias=bias, dtype=dtype).eval()
        for norm in (m for m in module.modules() if isinstance(m, nn.BatchNorm2d)):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias)
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
        return module

    return build


@pytest.fixture
def lower(make):
    """Rewrite a form, or (name, module) pairs in a row; check that the outputs agree, and return the new form."""

    @torch.no_grad()
    def check(form, *names):
        for dtype, tolerance in TOLERANCE.items():
            module = form if isinstance(form, ChainConv2d) else make(form, dtype)
            terms = module.weighted()
            for name in names:
                terms = find_lowering(name).rewrite(terms)
                assert isinstance(terms, tuple), f"{name}: {terms}"
            lowered = ChainConv2d.from_weighted(terms, module.spec, dtype=module_dtype(module))
            x = torch.randn(2, module.in_channels, 9, 8, dtype=module_dtype(module))
            expected = module(x)
            output = lowered(x)
            assert output.shape == expected.shape
            assert float((output - expected).abs().max() / expected.abs().max()) < tolerance
        return form_of(terms)

    return check


def module_dtype(module):
    return next(module.parameters()).dtype


@pytest.fixture
def refusal(make):
    """Why a lowering refuses a form."""

    def refuse(form, name):
        return find_lowering(name).rewrite(make(form).weighted())

    return refuse
