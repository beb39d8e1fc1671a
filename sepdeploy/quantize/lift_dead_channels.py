"""Give channels whose weights are as good as zero a scale that their bias fits into.

Biases are 32-bit integers in steps of the input's scale times the channel's. Training with weight decay leaves channels
whose weights have shrunk to 1e-12 and whose bias has not: in such steps it overflows, and ai-edge-quantizer clips it
to next to nothing. Of weights that are all zero onnxruntime takes 1 for the scale, which is too coarse for a bias.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.fx import GraphModule

from sepdeploy.analyze.flow_graph import attribute
from sepdeploy.core.int8 import Affine
from sepdeploy.quantize.simulate import output_axis, quantized_places, source_place

__all__ = ["has_dead_channels", "lift_dead_channels"]

_LARGEST_CODE = 2.0**29
"""Of a bias: it leaves room for what is added to it, and for weights of 7 bits."""


def has_dead_channels(graph: GraphModule, affines: Mapping[str, Affine]) -> bool:
    """Whether there is anything to lift."""
    return any(bool((largest < least).any()) for _, largest, least in _channels(graph, affines))


@torch.no_grad()
def lift_dead_channels(graph: GraphModule, affines: Mapping[str, Affine]) -> None:
    """Raise one weight of each dead channel until the channel's scale fits the bias; in place.

    That weight then adds 127 * 255 / 2^29 of the bias to the output at most, less than a fiftieth of an int8 step.

    Args:
        graph: Of the network, whose parameters it shares (`capture_graph`).
        affines: How activations are rounded, by the name of their place.
    """
    for weight, largest, least in _channels(graph, affines):
        first = weight
        while first.dim() > 1:
            first = first.select(1, 0)
        first.copy_(torch.where(largest < least, least, first))


def _channels(graph: GraphModule, affines: Mapping[str, Affine]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Weights, (O, ...), with each channel's largest magnitude, (O,), and the least that its bias asks for, (O,)."""
    places = {node for node in quantized_places(graph) if node.name in affines}
    for node in graph.graph.nodes:
        axis = output_axis(node)
        if axis is None or len(node.args) < 3:
            continue
        weight, bias = (attribute(graph, argument) for argument in node.args[1:3])
        source = source_place(node.all_input_nodes[0], places)
        if weight is not None and bias is not None and source is not None:
            rows = weight.detach().movedim(axis, 0)
            step = affines[source.name].scale * _LARGEST_CODE / 127
            yield rows, rows.abs().flatten(1).amax(1), bias.detach().abs() / step
