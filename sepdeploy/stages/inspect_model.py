"""Look at a network before anything is decided."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from sepdeploy.analyze.liveness import measure_memory
from sepdeploy.analyze.trace import trace_network
from sepdeploy.core.inspection import Inspection
from sepdeploy.core.plan import Candidate, SchemeOptions
from sepdeploy.errors import UsageError
from sepdeploy.loading.model import load_model
from sepdeploy.planning.candidates import find_candidate
from sepdeploy.planning.memory import memory_with_candidates
from sepdeploy.schemes.scheme import find_scheme

__all__ = ["inspect_model"]


def inspect_model(
    model: Path,
    arch: str,
    input_shape: tuple[int, int, int],
    schemes: Sequence[str],
    options: SchemeOptions,
    *,
    includes_linear: bool = False,
) -> Inspection:
    """What a network consists of, what each convolution could become, and how much memory that takes.

    Args:
        model: The checkpoint.
        arch: The architecture.
        input_shape: (C, H, W).
        schemes: Names of the schemes to try.
        options: Hyper-parameters of the schemes.
        includes_linear: Whether to list linear layers too, as 1x1 convolutions.

    Raises:
        SepdeployError: if the network cannot be loaded or traced.
    """
    if min(input_shape) < 1:
        raise UsageError(f"--input-shape must be positive, got {','.join(map(str, input_shape))}")
    loaded = load_model(model, arch)
    example = torch.zeros(1, *input_shape)
    traced = trace_network(loaded.module, example, includes_linear=includes_linear)
    found = [find_scheme(name) for name in schemes]
    candidates = {
        site.name: {scheme.name: find_candidate(site, scheme, options) for scheme in found} for site in traced.sites
    }
    memory_with, notes = {}, list(loaded.notes)
    for scheme in found:
        offers = {name: of_site[scheme.name] for name, of_site in candidates.items()}
        chosen = {name: offer for name, offer in offers.items() if isinstance(offer, Candidate)}
        if not chosen:
            continue
        try:
            memory_with[scheme.name] = memory_with_candidates(loaded.module, traced, chosen, example)
        except UsageError as error:
            notes.append(f"no memory is given for {scheme.name}: {error}")
    return Inspection(traced, candidates, measure_memory(loaded.module, example), memory_with, tuple(notes))
