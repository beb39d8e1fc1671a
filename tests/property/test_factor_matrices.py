import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sepdeploy.core.conv import ConvSpec
from sepdeploy.core.plan import SchemeOptions
from sepdeploy.errors import ContractError
from sepdeploy.schemes.kernels import compose_kernels
from sepdeploy.schemes.low_rank_svd import factor_matrices
from sepdeploy.schemes.module import ChainConv2d
from sepdeploy.schemes.scheme import find_scheme

quick = settings(deadline=None, max_examples=60, derandomize=True, database=None)
sizes = st.integers(1, 7)


def weighted_error(matrices, factors, moments):
    difference = matrices - factors[0] @ factors[1]
    return torch.einsum("bnm,bnk,bkm->b", difference, moments, difference).clamp_min(0)


@given(batch=st.integers(1, 3), n=sizes, m=sizes, samples=st.integers(0, 12), seed=st.integers(0, 99), data=st.data())
@quick
def test_whitening_never_has_the_larger_weighted_error(batch, n, m, samples, seed, data):
    rank = data.draw(st.integers(1, min(n, m)))
    scale = data.draw(st.sampled_from([1e-6, 1.0, 1e6]))
    generator = torch.Generator().manual_seed(seed)
    matrices = torch.randn(batch, n, m, dtype=torch.float64, generator=generator)
    x = scale * torch.randn(batch, n, samples, dtype=torch.float64, generator=generator)
    x[:, 0] = 0  # a dead input
    moments = x @ x.mT
    whitened = factor_matrices(matrices, rank, moments)
    plain = factor_matrices(matrices, rank)
    assert all(bool(torch.isfinite(factor).all()) for factor in (*whitened, *plain))
    energy = torch.einsum("bnm,bnk,bkm->b", matrices, moments, matrices)
    # 1e-5 of the energy: the damping's price
    assert bool(
        (weighted_error(matrices, whitened, moments) <= weighted_error(matrices, plain, moments) + 1e-5 * energy).all()
    )


def test_whitening_survives_the_rounding_of_moments_but_not_nonsense():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 3, dtype=torch.float64, generator=generator) + 10
    noise = torch.randn(40, 40, dtype=torch.float64, generator=generator)
    moments = (x @ x.mT)[None]
    moments += 2e-5 * moments.max() * (noise + noise.mT)  # eigenvalues below zero
    assert float(torch.linalg.eigvalsh(moments).min()) < -1e-5 * float(moments.diagonal(dim1=1, dim2=2).mean())
    matrices = torch.randn(1, 40, 20, dtype=torch.float64, generator=generator)
    left, right = factor_matrices(matrices, 20, moments)
    assert torch.allclose(left @ right, matrices, atol=1e-9)
    with pytest.raises(ContractError, match="positive semi-definite"):
        factor_matrices(matrices, 5, -moments)


@given(n=sizes, m=sizes, true_rank=st.integers(0, 3), seed=st.integers(0, 99))
@quick
def test_exact_from_the_true_rank_on_and_balanced(n, m, true_rank, seed):
    generator = torch.Generator().manual_seed(seed)
    matrices = torch.randn(2, n, true_rank, generator=generator) @ torch.randn(2, true_rank, m, generator=generator)
    left, right = factor_matrices(matrices, min(n, m))
    assert torch.allclose(left @ right, matrices, atol=1e-5)
    assert torch.allclose(left.norm(dim=1), right.norm(dim=2), atol=1e-4)


@given(
    scheme_name=st.sampled_from(["dense", "depthwise_separable", "spatial_separable"]),
    groups=st.sampled_from([1, 2, 3]),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    terms=st.integers(1, 3),
    seed=st.integers(0, 99),
)
@quick
@torch.no_grad()
def test_composed_kernel_is_what_the_module_computes(scheme_name, groups, kernel, terms, seed):
    spec = ConvSpec(2 * groups, 3 * groups, kernel, groups=groups)
    form = find_scheme(scheme_name).design(spec, SchemeOptions(terms=terms, rank_ratio=0.6))
    module = ChainConv2d(form, spec, bias=False)
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.normal_(generator=generator)
    weights = tuple(tuple(conv.weight for conv in term) for term in module.factor_modules())
    dense = compose_kernels(weights, form, groups)
    assert dense.shape == (3 * groups, 2, *kernel)
    x = torch.randn(2, 2 * groups, 6, 7, generator=generator)
    expected = torch.nn.functional.conv2d(x, dense, groups=groups)
    assert float((module(x) - expected).abs().max() / expected.abs().max()) < 1e-5
    assert torch.equal(module.weight, dense)
