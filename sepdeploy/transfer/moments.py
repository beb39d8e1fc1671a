"""Sums over calibration images, batch by batch: activations themselves are never kept.

The products of a batch are computed in the precision of its activations, at least float32, and the batches are added up
in float64.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F  # noqa: N812 (PyTorch's own convention)
from torch import Tensor

from sepdeploy.core.chain import Factor
from sepdeploy.schemes.kernels import split_groups

__all__ = ["LeastSquaresSums", "patch_moments", "patches"]

_LEAST_ENERGY = 1e-4
"""Share of the mean energy of the features below which a feature counts as nearly dead when penalties are set."""

_ROUNDING = 4.0
"""Relative error of an entry of a sum, in units of the products' precision, as measured on random features."""


def patches(x: Tensor, factor: Factor) -> Tensor:
    """What each output position of a grouped convolution reads.

    Args:
        x: (N, C, H, W).
        factor: The convolution.

    Returns:
        (groups, in_per_group * Kh * Kw, N * H' * W'), ordered as the kernel (in_per_group, Kh, Kw) is; smaller groups
        end in zeros.
    """
    top, bottom, left, right = factor.padding
    if factor.kernel_size == (1, 1):
        unfolded = F.pad(x, (left, right, top, bottom))[:, :, :: factor.stride[0], :: factor.stride[1]].flatten(2)
    else:
        unfolded = F.unfold(
            F.pad(x, (left, right, top, bottom)),
            factor.kernel_size,
            dilation=factor.dilation,
            stride=factor.stride,
        )
    batch, _, positions = unfolded.shape
    channels = unfolded.reshape(batch, factor.in_channels, -1, positions).permute(1, 2, 0, 3)
    return split_groups(channels, factor.in_groups).reshape(factor.groups, -1, batch * positions)


def patch_moments(x: Tensor, factor: Factor) -> Tensor:
    """Sum over positions of patch patch^T for each group, (groups, n, n).

    Computed in the precision of `x`, at least float32, and returned as float64 for adding up.
    """
    columns = _at_least_float32(patches(x, factor))
    return (columns @ columns.mT).double()


def _at_least_float32(x: Tensor) -> Tensor:
    """Half-precision values (from autocast inside a network) as float32, others as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class LeastSquaresSums:
    """Sums that a least-squares problem y ~ W p + b needs, one problem per group of channels.

    Each batch's products are in the precision of the batch, at least float32; their sums over batches are in float64.

    Attributes:
        gram: Sum of [p; 1] [p; 1]^T, (G, n + 1, n + 1), float64.
        cross: Sum of [p; 1] y^T, (G, n + 1, m), float64.
        target_energy: Sum of y^2 over everything, float64.
        positions: Number of positions summed.
        precision: Relative spacing of the numbers whose products were summed; the coarsest of all batches.
    """

    def __init__(self, groups: int, features: int, outputs: int) -> None:
        self.gram = torch.zeros(groups, features + 1, features + 1, dtype=torch.float64)
        self.cross = torch.zeros(groups, features + 1, outputs, dtype=torch.float64)
        self.target_energy = 0.0
        self.positions = 0
        self.precision = torch.finfo(torch.float64).eps

    def add(self, columns: Tensor, targets: Tensor) -> None:
        """Add a batch: `columns` (G, n, P) with their `targets` (G, m, P)."""
        columns, targets = _at_least_float32(columns), _at_least_float32(targets)
        ones = columns.new_ones(columns.shape[0], 1, columns.shape[2])
        extended = torch.cat([columns, ones], dim=1)
        self.gram += (extended @ extended.mT).double()
        self.cross += (extended @ targets.mT).double()
        self.target_energy += float(targets.double().square().sum())
        self.positions += columns.shape[2]
        self.precision = max(self.precision, torch.finfo(columns.dtype).eps)

    def __add__(self, other: LeastSquaresSums) -> LeastSquaresSums:
        total = LeastSquaresSums(self.gram.shape[0], self.gram.shape[1] - 1, self.cross.shape[2])
        total.gram = self.gram + other.gram
        total.cross = self.cross + other.cross
        total.target_energy = self.target_energy + other.target_energy
        total.positions = self.positions + other.positions
        total.precision = max(self.precision, other.precision)
        return total

    def squared_error(self, solution: Tensor) -> float:
        """Sum of |y - solution^T [p; 1]|^2 over all positions, for `solution` (G, n + 1, m).

        Never below the rounding of the sums that it is the difference of: large weights that cancel each other on
        nearly dead features have a large rounding, and so do not pass for a perfect fit.
        """
        fitted = float((solution * (self.gram @ solution)).sum() - 2 * (solution * self.cross).sum())
        return max(self.target_energy + fitted, self._rounding(solution))

    def _rounding(self, solution: Tensor) -> float:
        """Standard deviation of the squared error if every entry of the sums is off by a few units of precision."""
        squares = solution.square()
        variance = float((squares * (self.gram.square() @ squares)).sum() + 4 * (squares * self.cross.square()).sum())
        return _ROUNDING * self.precision * math.sqrt(self.target_energy**2 + variance)

    def penalty(self, ridge: float) -> Tensor:
        """Price of a squared change of each weight, (G, n + 1): `ridge` times the energy of its feature.

        Nearly dead features cost as much as weak ones: else their weights, which hardly any position checks, would be
        free to grow without bounds.
        """
        energy = self.gram.diagonal(dim1=-2, dim2=-1)
        floor = _LEAST_ENERGY * energy[:, :-1].mean(-1, keepdim=True)
        return ridge * torch.maximum(energy, floor).clamp_min(torch.finfo(torch.float64).tiny)

    def solve(self, prior: Tensor, ridge: float) -> Tensor:
        """Minimize the squared error + sum_i penalty(ridge)_i |solution_i - prior_i|^2.

        The penalty pulls towards a known good solution, so that dead or collinear features keep their prior weights and
        the system is never singular.

        Args:
            prior: (G, n + 1, m), float64.
            ridge: Above 0.

        Returns:
            (G, n + 1, m), float64.
        """
        system = self.gram + torch.diag_embed(self.penalty(ridge))
        right_side = self.cross - self.gram @ prior
        factor, failures = torch.linalg.cholesky_ex(system)
        step = torch.cholesky_solve(right_side, factor)
        if bool(failures.any()) or not bool(torch.isfinite(step).all()):
            step = torch.linalg.lstsq(system, right_side).solution
        return prior + step
