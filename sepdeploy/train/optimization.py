"""Optimizers and the course of the learning rate."""

from __future__ import annotations

import math

import torch
from torch import nn

from sepdeploy.core.training import OptimizerName, TrainOptions
from sepdeploy.errors import UsageError

__all__ = ["learning_rate", "make_optimizer", "peak_learning_rate"]

_LEARNING_RATES: dict[OptimizerName, float] = {"adamw": 3e-3, "sgd": 0.05}
_WEIGHT_DECAYS: dict[OptimizerName, float] = {"adamw": 1e-2, "sgd": 5e-4}
_MOMENTUM = 0.9


def make_optimizer(network: nn.Module, options: TrainOptions) -> torch.optim.Optimizer:
    """An optimizer of the weights that require gradients; those with fewer than two dimensions do not decay.

    Raises:
        UsageError: if no weight requires gradients.
    """
    weights = [weight for weight in network.parameters() if weight.requires_grad]
    if not weights:
        raise UsageError("every weight of the network is frozen (requires_grad=False); there is nothing to fine-tune")
    decay = _WEIGHT_DECAYS[options.optimizer] if options.weight_decay is None else options.weight_decay
    groups = [
        {"params": [weight for weight in weights if weight.ndim >= 2], "weight_decay": decay},
        {"params": [weight for weight in weights if weight.ndim < 2], "weight_decay": 0.0},
    ]
    rate = peak_learning_rate(options)
    if options.optimizer == "sgd":
        return torch.optim.SGD(groups, rate, momentum=_MOMENTUM, nesterov=True)
    return torch.optim.AdamW(groups, rate)


def peak_learning_rate(options: TrainOptions) -> float:
    """The learning rate after the warm-up."""
    return _LEARNING_RATES[options.optimizer] if options.learning_rate is None else options.learning_rate


def learning_rate(options: TrainOptions, step: int, steps: int) -> float:
    """The rate of step `step`, from 0, of `steps`: a linear rise, then a cosine that would reach 0 at `steps`.

    Loshchilov and Hutter, "SGDR: Stochastic Gradient Descent with Warm Restarts", 2017, without restarts.
    """
    peak = peak_learning_rate(options)
    rise = round(options.warmup_ratio * steps)
    if step < rise:
        return peak * (step + 1) / rise
    return peak * 0.5 * (1 + math.cos(math.pi * (step - rise) / max(steps - rise, 1)))
