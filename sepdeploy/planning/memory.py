"""Activation memory of a network with and without separable forms, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from sepdeploy.analyze.liveness import measure_memory
from sepdeploy.core.conv import Trace
from sepdeploy.core.memory import MemoryProfile
from sepdeploy.core.plan import Candidate
from sepdeploy.passes.replace_convs import copy_network, replace_modules
from sepdeploy.schemes.module import chain_class

__all__ = ["memory_with_candidates"]


def memory_with_candidates(
    network: nn.Module, trace: Trace, candidates: Mapping[str, Candidate], example: Tensor
) -> MemoryProfile:
    """Memory of the network with every candidate in place; weights do not matter and stay random.

    Args:
        network: The original network, in eval mode; it is not changed.
        trace: Its trace.
        candidates: Name of a convolution -> what it becomes.
        example: One image as the network takes it.

    Raises:
        UsageError: if the network does not run with the candidates in place.
    """
    trial = copy_network(network)
    for name, candidate in candidates.items():
        site = trace.site(name)
        layer = trial.get_submodule(name)
        if site.spec is None:
            continue
        module = chain_class(layer)(candidate.form, site.spec, bias=True, dtype=next(layer.parameters()).dtype)
        replace_modules(trial, {name: module.eval()})
    return measure_memory(trial, example)
