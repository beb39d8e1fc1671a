"""The exponential moving average of a network's weights."""

from __future__ import annotations

import copy

import torch
from torch import nn

__all__ = ["WeightAverage"]


class WeightAverage:
    """A copy of a network, in eval mode, whose weights follow the network's slowly.

    The decay rises as (1 + t) / (10 + t) with the updates t, up to `decay`: so short runs do not hang on to the weights
    that they began with. Buffers, such as the statistics of batch norms, are averages themselves and are copied.

    Args:
        network: On its device; with the weights to begin with.
        decay: In (0, 1).
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self._decay = decay

    @torch.no_grad()
    def update(self, network: nn.Module, updates: int) -> None:
        """Follow `network`, `updates` having been made before."""
        decay = min(self._decay, (1 + updates) / (10 + updates))
        pairs = zip(self.network.parameters(), network.parameters(), strict=True)
        own, current = zip(*((mine, theirs) for mine, theirs in pairs if theirs.requires_grad), strict=True)
        torch._foreach_lerp_(own, current, 1 - decay)
        for mine, theirs in zip(self.network.buffers(), network.buffers(), strict=True):
            mine.copy_(theirs)
