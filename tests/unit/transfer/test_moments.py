import itertools

import pytest
import torch
import torch.nn.functional as F  # noqa: N812

from sepdeploy.core.chain import Factor
from sepdeploy.transfer.moments import LeastSquaresSums, patch_moments, patches


def random_problem(groups=2, features=5, outputs=3, positions=200, seed=0):
    generator = torch.Generator().manual_seed(seed)
    columns = torch.randn(groups, features, positions, generator=generator)
    truth = torch.randn(groups, outputs, features, generator=generator)
    noise = torch.randn(groups, outputs, positions, generator=generator)
    return columns, truth @ columns + 3 + 0.1 * noise


def sums_of(columns, targets):
    sums = LeastSquaresSums(columns.shape[0], columns.shape[1], targets.shape[1])
    sums.add(columns, targets)
    return sums


def zeros_for(columns, targets):
    return torch.zeros(columns.shape[0], columns.shape[1] + 1, targets.shape[1], dtype=torch.float64)


def extended(columns):
    return torch.cat([columns, torch.ones_like(columns[:, :1])], dim=1).double()


@pytest.mark.parametrize("groups", [1, 3])
def test_solve_agrees_with_lstsq_group_by_group(groups):
    columns, targets = random_problem(groups=groups)
    solution = sums_of(columns, targets).solve(zeros_for(columns, targets), 1e-12)
    expected = torch.linalg.lstsq(extended(columns).mT, targets.double().mT).solution
    assert torch.allclose(solution, expected, atol=1e-4)


def test_squared_error_is_that_of_the_positions():
    columns, targets = random_problem()
    solution = torch.randn(2, 6, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = (targets.double() - solution.mT @ extended(columns)).square().sum()
    assert sums_of(columns, targets).squared_error(solution) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize("cuts", [[100], [1, 2, 150]])
def test_batches_give_the_same_as_all_at_once(cuts):
    columns, targets = random_problem()
    whole = sums_of(columns, targets)
    streamed = LeastSquaresSums(2, 5, 3)
    added = LeastSquaresSums(2, 5, 3)
    edges = [0, *cuts, 200]
    for start, end in itertools.pairwise(edges):
        streamed.add(columns[..., start:end], targets[..., start:end])
        added = added + sums_of(columns[..., start:end], targets[..., start:end])
    for other in (streamed, added):
        assert other.positions == 200
        assert torch.allclose(other.gram, whole.gram, rtol=1e-4, atol=1e-4)
        assert torch.allclose(other.cross, whole.cross, rtol=1e-4, atol=1e-4)
        assert other.target_energy == pytest.approx(whole.target_energy)


def test_adding_leaves_both_sums_as_they_were():
    one, two = sums_of(*random_problem(seed=0)), sums_of(*random_problem(seed=1))
    before = one.gram.clone()
    total = one + two
    total.gram.zero_()
    assert torch.equal(one.gram, before)


@pytest.mark.parametrize("ridge", [1e-6, 1e-1])
def test_dead_and_collinear_features_keep_their_prior(ridge):
    columns, targets = random_problem(groups=1, features=6)
    columns[:, 2] = 0  # dead
    columns[:, 4] = columns[:, 3]  # collinear
    columns[:, 5] = 7  # constant: collinear with the bias
    prior = torch.randn(1, 7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    sums = sums_of(columns, targets)
    solution = sums.solve(prior, ridge)
    assert bool(torch.isfinite(solution).all())
    assert torch.allclose(solution[:, 2], prior[:, 2], atol=1e-9)
    assert sums.squared_error(solution) <= sums.squared_error(prior)


@pytest.mark.parametrize("offset", [0.0, 1e3, 1e6])
def test_one_position_or_nothing_but_constants_stays_finite(offset):
    columns = torch.full((2, 40, 1), offset)
    targets = torch.ones(2, 3, 1)
    prior = torch.randn(2, 41, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    solution = sums_of(columns, targets).solve(prior, 1e-6)
    assert bool(torch.isfinite(solution).all())
    fitted = solution.mT @ extended(columns)
    assert torch.allclose(fitted, targets.double(), atol=1e-2 + 1e-5 * offset)


def test_indefinite_gram_from_rounding_is_solved_all_the_same():
    # Rounding of float32 products can leave a gram matrix with a slightly negative eigenvalue; Cholesky then stops
    # half-way with finite garbage.
    columns, targets = random_problem(groups=1, features=2, outputs=1)
    sums = sums_of(columns, targets)
    sums.gram[0, :2, :2] = torch.tensor([[1.0, 1.001], [1.001, 1.0]]) * 200
    prior = torch.zeros(1, 3, 1, dtype=torch.float64)
    solution = sums.solve(prior, 1e-6)
    penalty = torch.diag_embed(1e-6 * sums.gram.diagonal(dim1=-2, dim2=-1))
    assert torch.allclose((sums.gram + penalty) @ solution, sums.cross, rtol=1e-6, atol=1e-6)


def nearly_dead_features(positions=4000):
    """Three features, and three that repeat them with a relative error of 1e-4: their difference is nearly dead."""
    columns, _ = random_problem(groups=1, features=3, positions=positions)
    noise = torch.randn(1, 3, positions, generator=torch.Generator().manual_seed(5))
    columns = torch.cat([columns, columns * (1 + 1e-4 * noise)], dim=1)
    return columns, columns[:, :2] + 0.5 * columns[:, 1:3]


def test_large_weights_that_cancel_are_no_perfect_fit():
    columns, targets = nearly_dead_features()
    sums = sums_of(columns, targets)
    exact = torch.zeros(1, 7, 2, dtype=torch.float64)
    exact[0, :3] = torch.linalg.lstsq(columns[0, :3].double().mT, targets[0].double().mT).solution
    wild = exact.clone()
    wild[0, :3] += 300
    wild[0, 3:6] -= 300
    true_error = float((targets.double() - wild.mT @ extended(columns)).square().sum())
    assert sums.squared_error(exact) < 1e-5 * sums.target_energy
    # Whatever rounding makes of the sums: even if they come out below zero.
    for change in (0, 3e-7):
        rounded = sums_of(columns, targets)
        rounded.gram[:, :3, :3] *= 1 - change
        assert rounded.squared_error(wild) > 0.1 * true_error
        assert rounded.squared_error(wild) > 100 * sums.squared_error(exact)


def test_rounding_is_that_of_the_coarsest_batch():
    columns, targets = random_problem()
    double, single = sums_of(columns.double(), targets.double()), sums_of(columns, targets)
    assert double.precision == (double + double).precision < 1e-15
    assert (double + single).precision == single.precision == torch.finfo(torch.float32).eps
    exact = double.solve(zeros_for(columns, targets), 1e-12)
    residual = (targets.double() - exact.mT @ extended(columns)).square().sum()
    assert double.squared_error(exact) == pytest.approx(float(residual), rel=1e-9)


def test_nearly_dead_features_cost_as_much_as_weak_ones():
    columns, targets = random_problem(groups=1, features=6)
    columns[:, 2] *= 1e-6
    columns[:, 4] = 0
    penalty = sums_of(columns, targets).penalty(0.5)[0]
    energies = columns[0].double().square().sum(1)
    assert torch.allclose(penalty[[0, 1, 3, 5]], 0.5 * energies[[0, 1, 3, 5]], rtol=1e-5)
    assert torch.allclose(penalty[[2, 4]], 0.5 * 1e-4 * energies.mean(), rtol=1e-5)
    assert float(penalty[6]) == pytest.approx(0.5 * 200)  # the bias, whatever the scale of the features
    small = sums_of(1e-9 * columns, targets).penalty(0.5)[0]
    assert torch.allclose(small[:6], 1e-18 * penalty[:6], rtol=1e-5)


def test_half_precision_does_not_overflow():
    columns = torch.full((1, 4, 1000), 100.0, dtype=torch.float16)
    sums = sums_of(columns, columns[:, :2])
    assert float(sums.gram[0, 0, 0]) == pytest.approx(1e7)
    factor = Factor(4, 4, (1, 1))
    assert bool(torch.isfinite(patch_moments(columns.reshape(1, 4, 10, 100), factor)).all())


@pytest.mark.parametrize(
    "factor",
    [
        Factor(4, 6, (3, 2), (2, 1), (1, 0, 2, 1), (1, 2), 2),
        Factor(4, 6, (1, 1), (2, 3), groups=2),
        Factor(4, 4, (1, 1), (1, 1), (1, 2, 0, 1), groups=4),
        Factor(4, 4, (3, 3), padding=(1, 1, 1, 1), groups=4),
    ],
)
def test_patches_times_kernel_is_the_convolution(factor):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, 8, 7, generator=generator)
    per_group = factor.in_channels // factor.groups
    kernel = torch.randn(factor.out_channels, per_group, *factor.kernel_size, generator=generator)
    top, bottom, left, right = factor.padding
    expected = F.conv2d(
        F.pad(x, (left, right, top, bottom)), kernel, None, factor.stride, 0, factor.dilation, factor.groups
    )
    columns = patches(x, factor)
    fitted = kernel.reshape(factor.groups, factor.out_channels // factor.groups, -1) @ columns
    batch, _, height, width = expected.shape
    fitted = fitted.reshape(factor.out_channels, batch, height, width).transpose(0, 1)
    assert torch.allclose(fitted, expected, atol=1e-4)
    assert torch.allclose(patch_moments(x, factor), (columns @ columns.mT).double())
