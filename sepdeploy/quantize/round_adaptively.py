"""Adaptive rounding: weights are rounded up or down so that outputs, not weights, come nearest.

The objective is that of AdaRound (Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", 2020,
equation 13): for each row the error d of its weights costs d' H d, H being the second moments of what the layer reads
in the int8 network. AdaRound relaxes the choice of sides and needs some 10,000 steps of gradient descent for each
layer; here single choices are reversed as long as one lowers the cost, the best of each row first, all rows side by
side. Inputs are summed up in a stream, and the result does not depend on a learning rate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812  the name that PyTorch users know
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from sepdeploy.analyze.flow_graph import WEIGHTED, capture_graph, operator
from sepdeploy.core.int8 import Affine
from sepdeploy.quantize.correct_biases import float_weight
from sepdeploy.quantize.simulate import fake_quantized, weight_scales

__all__ = ["round_adaptively"]

_MOST_FEATURES = 2304
"""Window features that a row of weights may read (256 channels at 3x3); larger moments would take too much memory."""

_PASS_BYTES = 512 * 2**20
"""Moments of so many bytes are summed up in one pass over the images."""

_REVERSALS = 200
"""Most choices of a row that are reversed."""


_WHOLE = 1e-3
"""A weight so close to a code, in steps, has it: scales are float32."""


@dataclass(slots=True)
class _Layer:
    """A weight with the second moments of its inputs.

    Attributes:
        weight: The parameter, (O, I / groups, ...).
        groups: Of the convolution; 1 for linear layers.
        moments: (groups, n, n) float64, n features of a row.
    """

    weight: Tensor
    groups: int
    moments: Tensor

    @property
    def size_bytes(self) -> int:
        return self.moments.numel() * self.moments.element_size()


@torch.no_grad()
def round_adaptively(
    network: nn.Module, example: Tensor, affines: Mapping[str, Affine], batches: Callable[[], Iterable[Tensor]]
) -> str:
    """Put the weights of a network on their int8 grids, in place, each on the better side.

    The largest weight of each row stays, and with it the scale that exporters find.

    Args:
        network: In eval mode, batch norms folded.
        example: One image, (1, ...).
        affines: How activations are rounded, by the name of their place.
        batches: Starts a pass over calibration images.

    Returns:
        What was done, for the user; empty if there is no weight to round.
    """
    graph = fake_quantized(capture_graph(network, example), affines)
    layers = _layers(graph)
    reversed_count = total = 0
    for part in _parts(list(layers.values())):
        for layer in part:
            n = layer.weight[0].numel()
            layer.moments = torch.zeros(layer.groups, n, n, dtype=torch.float64)
        summing = _Moments(graph, {id(layer.weight): layer for layer in part})
        for batch in batches():
            summing.run(batch)
        for layer in part:
            reversed_count += _round(layer)
            total += layer.weight.numel()
            layer.moments = torch.zeros(0)
    return (
        f"{len(layers)} weights, {100 * reversed_count / total:.1f}% of their values to the farther side"
        if total
        else ""
    )


def _layers(graph: GraphModule) -> dict[int, _Layer]:
    """By the parameter's id, in the order of the first call."""
    found: dict[int, _Layer] = {}
    for node in graph.graph.nodes:
        weight, name = float_weight(graph, node), operator(node)
        if weight is None or name not in ("conv2d", "linear") or weight[0].numel() > _MOST_FEATURES:
            continue
        if name == "conv2d" and len(node.args) > 4 and isinstance(node.args[4], str):
            continue  # padding="same": its patches are not those of a number
        groups = int(node.args[6]) if name == "conv2d" and len(node.args) > 6 else 1
        n = weight[0].numel()
        found.setdefault(
            id(weight), _Layer(weight, groups, torch.empty(groups, n, n, dtype=torch.float64, device="meta"))
        )
    return found


def _parts(layers: list[_Layer]) -> Iterable[list[_Layer]]:
    """Layers in runs whose moments fit into memory together."""
    part: list[_Layer] = []
    for layer in layers:
        if part and sum(each.size_bytes for each in (*part, layer)) > _PASS_BYTES:
            yield part
            part = []
        part.append(layer)
    if part:
        yield part


class _Moments(Interpreter):
    """Adds up the second moments of what layers read."""

    def __init__(self, graph: GraphModule, layers: Mapping[int, _Layer]) -> None:
        super().__init__(graph)
        self._graph, self._layers = graph, layers

    def run_node(self, n: Node) -> Any:
        layer = self._layers.get(id(float_weight(self._graph, n))) if operator(n) in WEIGHTED else None
        if layer is not None:
            args = self.fetch_args_kwargs_from_env(n)[0]
            rows = _patches(args, layer) if operator(n) == "conv2d" else args[0].reshape(1, -1, args[0].shape[-1])
            layer.moments += (rows.mT @ rows).double()
        return super().run_node(n)


def _patches(args: Any, layer: _Layer) -> Tensor:
    """What each row of a convolution's weights is multiplied with, (groups, N * positions, n)."""
    x, size = args[0], layer.weight.shape[2:]
    stride, padding, dilation = (
        args[place] if len(args) > place else default for place, default in ((3, [1, 1]), (4, [0, 0]), (5, [1, 1]))
    )
    columns = F.unfold(x, tuple(size), tuple(dilation), tuple(padding), tuple(stride))  # (N, I * taps, positions)
    by_group = columns.reshape(len(columns), layer.groups, -1, columns.shape[2])
    return by_group.movedim(1, 0).transpose(2, 3).flatten(1, 2)


def _round(layer: _Layer) -> int:
    """Round one layer; how many values went to the farther side."""
    shape = layer.weight.shape
    rows = layer.weight.detach().double().reshape(layer.groups, shape[0] // layer.groups, -1)
    scale = weight_scales(layer.weight).double().reshape(layer.groups, -1, 1)
    codes = rows / scale
    nearest = torch.round(codes)
    difference = codes - nearest
    # What has a code already keeps it: the largest of each row above all, on which the scale rests.
    steps = torch.where(difference.abs() < _WHOLE, torch.zeros_like(codes), difference.sign())
    chosen, errors = nearest.clone(), (nearest - codes) * scale
    slopes = errors @ layer.moments
    curvature = layer.moments.diagonal(dim1=1, dim2=2)[:, None]
    for _ in range(min(_REVERSALS, 2 * codes.shape[2])):
        change = steps * scale
        gains = torch.where(steps == 0, torch.inf, 2 * slopes * change + curvature * change.square())
        best, place = gains.min(2, keepdim=True)
        taken = torch.where(best < 0, steps.gather(2, place), 0.0)
        if not bool(taken.any()):
            break
        chosen.scatter_add_(2, place, taken)
        columns = layer.moments.gather(1, place.expand(-1, -1, codes.shape[2]))
        slopes += taken * scale * columns
        steps.scatter_(2, place, torch.where(taken != 0, -taken, steps.gather(2, place)))
    layer.weight.copy_((chosen * scale).reshape(shape))
    return int((chosen != nearest).sum())
