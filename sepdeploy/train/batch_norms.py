"""What batch norms do while a network trains."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["synchronize_batch_norms", "train_batch_norms"]

_PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def train_batch_norms(network: nn.Module) -> None:
    """Let batch norms use and collect the statistics of each batch; everything else stays in eval mode, in place.

    So dropout and branches that only training takes stay off, and the outputs stay those that the original has. A
    batch norm whose own weights are all frozen keeps its statistics too: its user froze it.
    """
    network.eval()
    for module in network.modules():
        if isinstance(module, _BatchNorm):
            weights = list(module.parameters(recurse=False))
            module.train(not weights or any(weight.requires_grad for weight in weights))


def synchronize_batch_norms(network: nn.Module) -> None:
    """Let plain batch norms share their statistics among all processes, in place; the names of weights stay.

    Subclasses are left alone, as they may do more than normalize.
    """
    for parent in list(network.modules()):
        for name, child in list(parent._modules.items()):  # under every name that it has there
            if type(child) in _PLAIN:
                setattr(parent, name, nn.SyncBatchNorm.convert_sync_batchnorm(child))  # type: ignore[no-untyped-call]
