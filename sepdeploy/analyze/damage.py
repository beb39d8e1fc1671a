"""How much a network's outputs change: the one measure by which steps without labels are judged."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from sepdeploy.analyze.trace import output_tensors

__all__ = ["are_class_scores", "network_damage", "output_change"]


@torch.no_grad()
def network_damage(original: nn.Module, network: nn.Module, batches: Iterable[Tensor]) -> float:
    """Change of the outputs of `network` against the original's, per image or relative to their energy.

    Args:
        original: The trained network in eval mode.
        network: With the same outputs, in eval mode.
        batches: Images as both take them, on the device of their weights; none of the batches is changed.

    Returns:
        Mean Kullback-Leibler divergence of the class probabilities in nats where the network returns nothing but class
        scores (`are_class_scores`), else the squared relative error over all outputs. 0 for equal networks.
    """
    total, signal = 0.0, 0.0
    for batch in batches:
        change, energy = output_change(output_tensors(original(batch.clone())), output_tensors(network(batch.clone())))
        total, signal = total + change, signal + energy
    return total / max(signal, 1e-30)


def output_change(before: Sequence[Tensor], after: Sequence[Tensor]) -> tuple[float, float]:
    """Change of the outputs for one batch, and what it is relative to: divergence and images, or error and energy."""
    if are_class_scores(before):
        log_p, log_q = (torch.log_softmax(outputs[0].double(), 1) for outputs in (before, after))
        return _finite((log_p.exp() * (log_p - log_q)).sum()), float(len(before[0]))
    change = sum(_finite((a.double() - b.double()).square().sum()) for b, a in zip(before, after, strict=True))
    return change, sum(_finite(b.double().square().sum()) for b in before)


def are_class_scores(outputs: Sequence[Tensor]) -> bool:
    """Whether a network's outputs are one score per class: a single tensor (N, C) with C >= 2."""
    return len(outputs) == 1 and outputs[0].dim() == 2 and outputs[0].shape[1] >= 2


def _finite(value: Tensor) -> float:
    """A number that sorts last where the network overflowed."""
    return float(torch.nan_to_num(value, nan=1e30, posinf=1e30, neginf=1e30).clamp(max=1e30))
