"""Batched truncated SVD, plain or weighted by the second moments of the inputs: the step that all schemes share."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["factor_matrices"]

_DAMPING = 1e-6  # of the mean eigenvalue: keeps the whitening finite for dead or constant inputs


def factor_matrices(matrices: Tensor, rank: int, moments: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The best rank-`rank` factors of each matrix, on inputs with the given second moments.

    Minimizes E |x^T M - x^T left right|^2 over x with E[x x^T] = S: the truncated SVD of S^(1/2) M, mapped back
    (Eckart-Young in the norm that S induces). With no moments S is the identity and the norm is Frobenius'.

    Args:
        matrices: (B, n, m), inputs along the rows.
        rank: Number of components, 1 <= rank <= min(n, m).
        moments: (B, n, n) symmetric positive semi-definite, any scale; None for the identity.

    Returns:
        left: (B, n, rank), applied to the inputs first.
        right: (B, rank, m). Both carry the square root of the singular values, so that their scales are balanced.
    """
    work = matrices.double()
    root = inverse_root = None
    if moments is not None:
        root, inverse_root = _square_roots(moments.double())
        work = root @ work
    u, s, vh = torch.linalg.svd(work, full_matrices=False)
    scale = s[:, :rank].sqrt()
    left = u[:, :, :rank] * scale[:, None, :]
    right = vh[:, :rank] * scale[:, :, None]
    if inverse_root is not None:
        left = inverse_root @ left
    # The whitening changes the lengths of the columns: balance them again.
    norm_left, norm_right = left.norm(dim=1), right.norm(dim=2)
    balance = torch.where((norm_left > 0) & (norm_right > 0), (norm_right / norm_left.clamp_min(1e-300)).sqrt(), 1.0)
    left = left * balance[:, None, :]
    right = right / balance[:, :, None]
    return left.to(matrices.dtype), right.to(matrices.dtype)


def _square_roots(moments: Tensor) -> tuple[Tensor, Tensor]:
    """Symmetric square root and its inverse of each damped moment matrix, (B, n, n) each."""
    size = moments.shape[-1]
    mean = moments.diagonal(dim1=-2, dim2=-1).mean(-1).clamp_min(torch.finfo(moments.dtype).tiny)
    eye = torch.eye(size, dtype=moments.dtype)
    values, vectors = torch.linalg.eigh(moments / mean[:, None, None] + _DAMPING * eye)
    values = values.clamp_min(_DAMPING)
    root = vectors * values.sqrt()[:, None, :] @ vectors.mT
    inverse = vectors * values.rsqrt()[:, None, :] @ vectors.mT
    return root, inverse
