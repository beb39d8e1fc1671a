"""Carry out a plan: replace its convolutions one after the other, each on the inputs it will really get."""

from __future__ import annotations

import copy
from collections.abc import Callable

from torch import nn

from sepdeploy.core.conv import Trace
from sepdeploy.core.plan import Plan
from sepdeploy.core.report import LayerTransfer
from sepdeploy.passes.replace_convs import replace_modules
from sepdeploy.transfer.layer import Batches, TransferMethod, transfer_layer

__all__ = ["convert_network"]


def convert_network(
    original: nn.Module,
    trace: Trace,
    plan: Plan,
    batches: Batches,
    *,
    method: TransferMethod = "anchored",
    progress: Callable[[int, int], None] | None = None,
) -> tuple[nn.Module, tuple[LayerTransfer, ...]]:
    """A converted copy of the network, and the quality of each layer's transfer.

    Args:
        original: The trained network in eval mode; it is not changed.
        trace: Its trace.
        plan: What to replace by what.
        batches: Calibration images.
        method: How weights are found.
        progress: Called with (layers done, layers in all).

    Returns:
        The converted network in eval mode, and one entry per replaced convolution in the order of the trace.
    """
    converted = copy.deepcopy(original)
    replaced = plan.replaced
    transfers = []
    for site in trace.sites:
        if site.name not in replaced:
            continue
        module, transfer = transfer_layer(original, converted, site, replaced[site.name], batches, method)
        replace_modules(converted, {site.name: module})
        transfers.append(transfer)
        if progress:
            progress(len(transfers), len(replaced))
    return converted, tuple(transfers)
