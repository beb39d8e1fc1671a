"""Batched truncated SVD, plain or weighted by the second moments of the inputs: the step that all schemes share."""

from __future__ import annotations

import torch
from torch import Tensor

from sepdeploy.errors import ContractError

__all__ = ["factor_matrices"]

_LEAST_ENERGY = 1e-4
"""Share of the mean input energy below which a direction's outputs stay smaller than the others'."""

_DAMPINGS = (1e-6, 1e-5, 1e-4, 1e-3)
"""Shares of the largest eigenvalue, of which the first that is enough is added to all."""


def factor_matrices(
    matrices: Tensor, rank: int, moments: Tensor | None = None, moments_of: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The best rank-`rank` factors of each matrix, on inputs with the given second moments.

    Minimizes E |x^T M - x^T left right|^2 over x with E[x x^T] = S = R^T R: the truncated SVD of R M, mapped back
    (Eckart-Young in the norm that S induces). With no moments S is the identity and the norm is Frobenius'.

    Args:
        matrices: (B, n, m), inputs along the rows.
        rank: Number of components, 1 <= rank <= min(n, m).
        moments: (B, n, n) symmetric positive semi-definite, any scale; None for the identity.
        moments_of: (B,) which of the `moments` (G, n, n) each matrix has; None for one each.

    Returns:
        left: (B, n, rank), applied to the inputs first.
        right: (B, rank, m).
        Without moments both carry the square root of the singular values. With moments every left factor gives
        outputs of the same energy, uncorrelated within a matrix: then no component cancels another, and one int8 scale
        fits all middle channels.
    """
    work = matrices.double()
    if moments is None:
        left, right = _top_components(work, rank)
        scale = right.norm(dim=2).clamp_min(torch.finfo(work.dtype).tiny).sqrt()
        left, right = left * scale[:, None, :], right / scale[:, :, None]
    else:
        root = _roots(moments.double())
        if moments_of is not None:
            root = root[moments_of]
        left, right = _top_components(root @ work, rank)
        left = torch.linalg.solve_triangular(root, left, upper=True)
        # Even outputs, but no amplifying of directions that the inputs hardly have: that would be rounding noise.
        energy = (1 + _LEAST_ENERGY * left.square().sum(1)).sqrt()
        left, right = left / energy[:, None, :], right * energy[:, :, None]
    return left.to(matrices.dtype), right.to(matrices.dtype)


def _top_components(matrices: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Leading left singular vectors (B, n, rank), and times what (B, rank, m) they give the best approximation.

    From the eigenvectors of the smaller Gram matrix, several times faster than a batched SVD. Their rounding only
    matters for components below 1e-8 of the largest; at full rank the vectors span everything whatever their order.
    """
    rows, columns = matrices.shape[1:]
    if rows <= columns:
        left = torch.linalg.eigh(matrices @ matrices.mT).eigenvectors.flip(2)[:, :, :rank]
        return left, left.mT @ matrices
    right = torch.linalg.eigh(matrices.mT @ matrices).eigenvectors.flip(2)[:, :, :rank].mT
    scaled = matrices @ right.mT
    size = scaled.norm(dim=1).clamp_min(torch.finfo(matrices.dtype).tiny)
    return scaled / size[:, None], right * size[:, :, None]


def _roots(moments: Tensor) -> Tensor:
    """Upper triangular R with R^T R the damped moments, (B, n, n).

    All matrices are divided by one number, the mean diagonal of the whole batch: their relative sizes stay. Damping
    keeps R well-conditioned for dead or constant inputs, and above the rounding of sums in float32.

    Raises:
        ContractError: if the moments are not even nearly positive semi-definite.
    """
    scaled = moments / moments.diagonal(dim1=-2, dim2=-1).mean().clamp_min(torch.finfo(moments.dtype).tiny)
    size = 1 + torch.linalg.matrix_norm(scaled, float("inf"))  # at least the largest eigenvalue
    for damping in _DAMPINGS:
        damped = scaled.clone()
        damped.diagonal(dim1=-2, dim2=-1).add_(damping * size[:, None])
        upper: Tensor
        upper, failures = torch.linalg.cholesky_ex(damped, upper=True)
        if not bool(failures.any()):
            return upper
    raise ContractError("second moments must be positive semi-definite")
