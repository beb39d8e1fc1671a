"""What each form of each layer does to the network's outputs, alone: the damage that the selection weighs.

A form is fitted with the rest of the network as it is (`transfer/isolated.py`), then the network is run from that layer
on (`analyze/replay.py`) on images that the fit has not seen. What comes before the layer is computed once for all its
forms. Layers are independent of each other, so several processes can share them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from sepdeploy.analyze.damage import output_change
from sepdeploy.analyze.replay import Replay
from sepdeploy.core.conv import Trace
from sepdeploy.errors import ContractError
from sepdeploy.passes.replace_convs import copy_network
from sepdeploy.planning.choices import LayerForms
from sepdeploy.planning.evaluate import first_images
from sepdeploy.schemes.module import ChainConv2d
from sepdeploy.transfer.isolated import isolated_transfers
from sepdeploy.transfer.layer import Batches

__all__ = ["Damages", "Gather", "deal_layers", "images_per_form", "measure_damages"]

Damages = dict[tuple[str, str], float]
"""(layer, label of the form) -> damage, as `analyze/damage.py` has it."""

Gather = Callable[[Damages], Sequence[Damages]]
"""Takes what one process measured, and returns what all did; the processes wait for each other in it."""

_WORK_MACS = 2e13
"""Multiply-accumulates for all measurements, some minutes: fewer images for larger networks."""

_IMAGES = (32, 256)
"""Fewest and most images for one measurement."""

_FIT_IMAGES = 128
"""About what a layer's fit costs beside its measurements, in complete runs of so many images."""


@torch.no_grad()
def measure_damages(
    original: nn.Module,
    trace: Trace,
    forms: Sequence[LayerForms],
    fit: Batches,
    held_out: Batches,
    *,
    progress: Callable[[int, int], None] | None = None,
    rank: int = 0,
    processes: int = 1,
    gather: Gather | None = None,
) -> Damages:
    """The damage of every form of every layer, on a GPU if there is one.

    Args:
        original: The trained network in eval mode; it is not changed.
        trace: Its trace.
        forms: What is weighed.
        fit: Calibration images for the transfer.
        held_out: Others, to measure on; the first `images_per_form` of them.
        progress: Called with (forms done, forms in all) of this process.
        rank: Number of this process, from 0.
        processes: How many share the layers; all must be given the same network, forms and images.
        gather: Brings together what they have measured.

    Returns:
        Mean Kullback-Leibler divergence of the class probabilities in nats where the network returns class scores, else
        the squared relative error over all outputs; in the order of `forms`. With several processes, of all that
        `gather` has returned.

    Raises:
        UnsupportedModelError: if the network does not run on the images, or its activations overflow.
    """
    network, device = _on_device(original, trace)
    images = images_per_form(trace, forms)
    mine = deal_layers(trace, forms, processes)[rank]
    total = sum(len(layer.forms) for layer in mine)
    damages: Damages = {}
    for layer in mine:
        modules = _fitted(network, trace, layer, _moved(fit, device))
        labels = [label for label, _, _ in layer.forms]
        changes = _damages_of(network, layer.name, modules, first_images(_moved(held_out, device)(), images))
        damages |= {(layer.name, label): change for label, change in zip(labels, changes, strict=True)}
        if progress:
            progress(len(damages), total)
    merged = {key: value for part in (gather(damages) if gather else (damages,)) for key, value in part.items()}
    order = [(layer.name, label) for layer in forms for label, _, _ in layer.forms]
    return {key: merged[key] for key in order if key in merged}


def deal_layers(trace: Trace, forms: Sequence[LayerForms], processes: int) -> list[list[LayerForms]]:
    """The layers of each process: the most work first, each to the process that has least so far."""
    works = _works(trace, forms)
    loads = [0.0] * processes
    hands: list[list[LayerForms]] = [[] for _ in range(processes)]
    for layer in sorted(forms, key=lambda layer: -works[layer.name]):
        if layer.forms:
            least = loads.index(min(loads))
            hands[least].append(layer)
            loads[least] += works[layer.name]
    return hands


def images_per_form(trace: Trace, forms: Sequence[LayerForms]) -> int:
    """How many held-out images each form is measured on: fewer for larger networks and more forms."""
    per_image = sum(_macs_from(trace, layer.name) * len(layer.forms) for layer in forms)
    low, high = _IMAGES
    return int(min(high, max(low, _WORK_MACS // max(per_image, 1))))


def _works(trace: Trace, forms: Sequence[LayerForms]) -> dict[str, float]:
    """Estimated multiply-accumulates by layer: the fit, then a run per form from the layer on."""
    images = images_per_form(trace, forms)
    return {
        layer.name: float(_FIT_IMAGES * trace.total_macs + len(layer.forms) * images * _macs_from(trace, layer.name))
        for layer in forms
    }


def _macs_from(trace: Trace, name: str) -> int:
    """Multiply-accumulates of a layer and of all that come after it, for one image."""
    names = [site.name for site in trace.sites]
    before = sum(site.macs for site in trace.sites[: names.index(name)])
    return max(trace.total_macs - before, trace.site(name).macs)


def _fitted(network: nn.Module, trace: Trace, layer: LayerForms, fit: Batches) -> list[ChainConv2d]:
    candidates = [candidate for _, candidate, _ in layer.forms]
    return list(isolated_transfers(network, trace.site(layer.name), candidates, fit))


def _damages_of(
    network: nn.Module, name: str, modules: Sequence[ChainConv2d], batches: Iterable[Tensor]
) -> list[float]:
    """Damage of each module in the layer's place."""
    totals, basis = [0.0] * len(modules), 0.0
    shares_prefix: bool | None = None
    for batch in batches:
        replay = Replay(network, name, batch, shares_prefix=shares_prefix)
        shares_prefix = replay.shares_prefix
        share = 0.0
        for index, module in enumerate(modules):
            change, share = output_change(replay.outputs, replay.run(module.to(batch.device)))
            totals[index] += change
        basis += share
    if shares_prefix is None:
        raise ContractError("no held-out images")
    return [total / max(basis, 1e-30) for total in totals]


def _on_device(original: nn.Module, trace: Trace) -> tuple[nn.Module, torch.device]:
    """The network where it runs fastest: a copy on the GPU of this process, if it runs there; else as it is."""
    cpu = torch.device("cpu")
    if not torch.cuda.is_available():
        return original, cpu
    from sepdeploy.train.processes import trains_on_cpu  # takes a second, and only matters here

    if trains_on_cpu():
        return original, cpu
    device = torch.device("cuda", torch.cuda.current_device())
    network = copy_network(original)
    try:
        network = network.to(device)
        network(torch.zeros(trace.input_shape, device=device))
    except Exception:  # a network that makes tensors of its own on the CPU
        return original, cpu
    return network, device


def _moved(batches: Batches, device: torch.device) -> Batches:
    return lambda: (batch.to(device) for batch in batches())
