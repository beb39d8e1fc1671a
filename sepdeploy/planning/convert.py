"""Carry out a plan: replace its convolutions one after the other, each on the inputs it will really get."""

from __future__ import annotations

import copy
from collections.abc import Callable

from torch import nn

from sepdeploy.core.chain import ChainSum
from sepdeploy.core.conv import Trace
from sepdeploy.core.plan import Plan
from sepdeploy.core.report import LayerTransfer
from sepdeploy.errors import UsageError
from sepdeploy.passes.replace_convs import copy_network, replace_modules
from sepdeploy.schemes.module import ChainConv2d
from sepdeploy.transfer.layer import Batches, TransferMethod, transfer_layer

__all__ = ["TransferMemory", "convert_network"]

TransferMemory = dict[tuple[tuple[str, ChainSum], ...], tuple[ChainConv2d, LayerTransfer]]
"""(what was replaced by what before it ..., its own name and form) -> the finished layer."""


def convert_network(
    original: nn.Module,
    trace: Trace,
    plan: Plan,
    batches: Batches,
    *,
    method: TransferMethod = "anchored",
    memory: TransferMemory | None = None,
    is_quick: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[nn.Module, tuple[LayerTransfer, ...]]:
    """A converted copy of the network, and the quality of each layer's transfer.

    Args:
        original: The trained network in eval mode; it is not changed.
        trace: Its trace.
        plan: What to replace by what.
        batches: Calibration images.
        method: How weights are found.
        memory: Layers transferred before, which is extended. A layer depends only on what the layers before it are
            replaced by, so changing a plan at its end costs only the new layers. Valid for one network, one set of
            images and one method.
        is_quick: Whether to leave out what takes most of the time and adds the least, for comparing layers.
        progress: Called with (layers done, layers in all).

    Returns:
        The converted network in eval mode, and one entry per replaced convolution in the order of the trace.

    Raises:
        UsageError: if the plan replaces a convolution that the network does not have.
        UnsupportedModelError: if the network cannot be copied, or does not run on the calibration images.
    """
    replaced = plan.replaced
    unknown = replaced.keys() - {site.name for site in trace.sites}
    if unknown:
        raise UsageError(
            f"the plan replaces {', '.join(sorted(unknown))}, which the network does not have; plan it anew"
        )
    converted = copy_network(original)
    transfers: list[LayerTransfer] = []
    done: tuple[tuple[str, ChainSum], ...] = ()
    for site in trace.sites:
        if site.name not in replaced:
            continue
        candidate = replaced[site.name]
        key = (*done, (site.name, candidate.form))
        if memory is not None and key in memory:
            module, transfer = memory[key]
            module = copy.deepcopy(module)  # passes on one network must not reach another
        else:
            module, transfer = transfer_layer(original, converted, site, candidate, batches, method, is_quick=is_quick)
            if memory is not None:
                memory[key] = (copy.deepcopy(module), transfer)
        replace_modules(converted, {site.name: module})
        done = key
        transfers.append(transfer)
        if progress:
            progress(len(transfers), len(replaced))
    return converted, tuple(transfers)
