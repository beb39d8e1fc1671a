"""Whether a folded network and an exported file compute what the network does, on real images."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from sepdeploy.analyze.batch_norms import is_plain_batchnorm
from sepdeploy.bench.session import open_session
from sepdeploy.core.conv import Trace
from sepdeploy.core.passing_errors import is_out_of_memory
from sepdeploy.errors import ContractError, ToolError, UnsupportedModelError
from sepdeploy.passes.fold_batchnorm import fold_batchnorm
from sepdeploy.passes.replace_convs import copy_network
from sepdeploy.planning.evaluate import run_network

__all__ = ["NUMERIC_TOLERANCE", "FoldedNetwork", "check_numerics", "fold_network", "largest_error", "numeric_error"]

NUMERIC_TOLERANCE = 1e-4
"""Largest difference between a float file and its PyTorch network, relative to the largest output."""

_SMALLEST_RANGE = 1e-6 / NUMERIC_TOLERANCE
"""Outputs smaller than this count as this large: whatever they are, 1e-6 is rounding."""


@dataclass(frozen=True, slots=True)
class FoldedNetwork:
    """A network without the batch norms behind its convolutions.

    Attributes:
        network: A copy.
        pairs: Name of each convolution -> the norm that was folded into it.
    """

    network: nn.Module
    pairs: Mapping[str, str]


def fold_network(network: nn.Module, traced: Trace, batch: np.ndarray) -> FoldedNetwork:
    """Fold every batch norm that directly follows a convolution, in a copy that is checked on real images.

    A network may look into a norm, or give it more than a tensor; then those of other classes stay, or all.

    Raises:
        UnsupportedModelError: if the network's own outputs are NaN.
        ContractError: if the outputs change by more than rounding.
    """
    expected = run_network(network, torch.from_numpy(batch))
    if any(np.isnan(output).any() for output in expected):
        raise UnsupportedModelError(
            "the network gives NaN on validation images, so nothing can be compared with it; check its weights and the "
            "mean and std of the images"
        )
    pairs = {site.name: site.norm for site in traced.sites if site.norm is not None}
    plain = {name: norm for name, norm in pairs.items() if is_plain_batchnorm(network.get_submodule(norm))}
    error = math.inf
    for chosen in (pairs, plain, {}):
        folded = copy_network(network).eval()
        folded.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        fold_batchnorm(folded, chosen)
        try:
            error = largest_error(expected, run_network(folded, torch.from_numpy(batch)))
        except Exception as failure:  # whatever Python code does with what it takes for a norm
            if is_out_of_memory(failure):
                raise
            continue
        if error <= NUMERIC_TOLERANCE:
            return FoldedNetwork(folded, chosen)
    raise ContractError(f"folding the batch norms changed the outputs by {error:.1e} of their range")


def check_numerics(path: Path, network: nn.Module, batch: np.ndarray, *, is_channels_last: bool) -> None:
    """See that a float file computes what its network does, on real images.

    Raises:
        ToolError: if it does not.
    """
    session = open_session(path, threads=1, is_channels_last=is_channels_last)
    error = largest_error(run_network(network, torch.from_numpy(batch)), session.predict(batch))
    if not error <= NUMERIC_TOLERANCE:
        raise ToolError(
            f"the exported {path.suffix} file computes something else than the network: outputs differ by {error:.1e} "
            "of their range; leave that format out with --formats"
        )


def numeric_error(path: Path, network: nn.Module, batch: np.ndarray, *, is_channels_last: bool) -> float:
    """Largest |output - output of the PyTorch network| on real images.

    Raises:
        ToolError: if an output is NaN, or infinite where the network's is not or the other way round.
    """
    session = open_session(path, threads=1, is_channels_last=is_channels_last)
    pairs = zip(run_network(network, torch.from_numpy(batch)), session.predict(batch), strict=True)
    error = float(np.max([_differences(expected, found).max(initial=0.0) for expected, found in pairs]))
    if not math.isfinite(error):
        raise ToolError(
            f"{path} gives NaN or infinite values where the network does not, or the other way round; leave its "
            "format out with --formats, or give a network with finite outputs"
        )
    return error


def largest_error(expected: tuple[np.ndarray, ...], found: tuple[np.ndarray, ...]) -> float:
    """Largest difference of any output, relative to that output's largest finite |value| (at least 0.01).

    NaN if any value is NaN, infinite if an infinite value differs.
    """
    errors = []
    for a, b in zip(expected, found, strict=True):
        largest = np.abs(a[np.isfinite(a)]).max(initial=0.0)
        errors.append(_differences(a, b).max(initial=0.0) / max(float(largest), _SMALLEST_RANGE))
    return float(np.max(errors))  # np.max and not max, which may pass over NaN


def _differences(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Elementwise |a - b| in float64, 0 for equal infinities."""
    with np.errstate(invalid="ignore"):  # the difference of equal infinities
        differences = np.abs(a.astype(np.float64) - b)
    return np.where(a == b, 0.0, differences)
