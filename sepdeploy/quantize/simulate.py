"""The int8 network in PyTorch: the float graph with every value rounded where the files round it.

Activations are 8-bit and asymmetric, one scale per tensor; weights are int8 and symmetric, one scale per output
channel. Gradients pass through the rounding as if it were not there and end where a value is clipped: the
straight-through estimator (Bengio et al., "Estimating or Propagating Gradients Through Stochastic Neurons", 2013).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from sepdeploy.analyze.flow_graph import MOVING, WEIGHTED, activation_nodes, operator, sole_reader
from sepdeploy.core.int8 import Affine
from sepdeploy.quantize.ranges import Histogram

__all__ = [
    "QuantizeActivation",
    "QuantizeWeight",
    "fake_quantized",
    "observe",
    "output_axis",
    "prescribed_affines",
    "quantized_places",
    "source_place",
    "watch",
    "weight_scales",
]

_SAME_SCALE = MOVING | {
    *("max_pool2d", "max_pool1d", "avg_pool2d", "adaptive_max_pool2d"),
    *("upsample_nearest2d", "upsample_bilinear2d"),
}
"""Operators whose output has the codes of their input: nothing is rounded anew, except where tensors are joined."""

_PRESCRIBED: Mapping[str, Affine] = MappingProxyType(
    {"sigmoid": Affine(1 / 256, 0), "softmax": Affine(1 / 256, 0), "tanh": Affine(1 / 128, 128)}
)
"""Operators whose results have a scale that TFLite prescribes, whatever they are."""

_UNJOINED = _PRESCRIBED.keys() | {"cat", "stack"}
"""Operators whose output keeps its own scale when it is joined to others."""

_TRANSPOSED = frozenset({"conv_transpose1d", "conv_transpose2d", "conv_transpose3d"})
"""Operators that multiply by weights too, (input, weight, bias, ...), but (I, O, ...)."""

_FUSED_ACTIVATIONS = frozenset({"relu", "relu6", "hardtanh", "clamp", "clamp_min"})
_FUSING = WEIGHTED | {"add", "sub", "mul", "getitem", "batch_norm"}


def quantized_places(graph: GraphModule) -> tuple[Node, ...]:
    """Nodes whose values both runtimes hold in 8 bits with a scale of their own, in order.

    The input, and whatever computes: convolutions with the activation that is fused to them, sums, products, joined
    tensors, global pooling. What only moves values keeps their codes. What only a concatenation reads is computed in
    its scale, as TFLite's concatenation demands.
    """
    flowing = activation_nodes(graph)
    places = []
    for node in graph.graph.nodes:
        if node not in flowing or not _is_float(node):
            continue
        name = operator(node)
        moves = name in _SAME_SCALE and name not in ("cat", "stack")
        is_norm = name == "getitem" and "norm" in operator(node.args[0])
        if (moves and not is_norm) or _is_fused(node) or _is_joined(node):
            continue
        places.append(node)
    return tuple(places)


def prescribed_affines(graph: GraphModule) -> dict[str, Affine]:
    """Scale and zero point of the places that have no choice, by name."""
    return {n.name: _PRESCRIBED[operator(n)] for n in quantized_places(graph) if operator(n) in _PRESCRIBED}


def source_place(node: Node, places: frozenset[Node] | set[Node]) -> Node | None:
    """The place whose codes `node` has: itself, or what its values were moved from."""
    while node not in places:
        if operator(node) not in _SAME_SCALE or not node.all_input_nodes:
            return None
        node = node.all_input_nodes[0]
    return node


def _is_float(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()


def _is_fused(node: Node) -> bool:
    """Whether an activation that alone reads the node is computed with it."""
    reader = sole_reader(node)
    return reader is not None and operator(node) in _FUSING and operator(reader) in _FUSED_ACTIVATIONS


def _is_joined(node: Node) -> bool:
    """Whether the node writes its part of a concatenation, which alone reads it."""
    reader = sole_reader(node)
    joins = reader is not None and operator(reader) == "cat"
    return joins and node.op == "call_function" and operator(node) not in _SAME_SCALE | _UNJOINED


class _Watcher(Interpreter):
    """Hands the values of some nodes to a function."""

    def __init__(self, graph: GraphModule, nodes: Iterable[Node], see: Callable[[Node, Tensor], None]) -> None:
        super().__init__(graph)
        self._nodes, self._see = set(nodes), see

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if n in self._nodes:
            self._see(n, result)
        return result


@torch.no_grad()
def watch(
    graph: GraphModule, nodes: Iterable[Node], batches: Iterable[Tensor], see: Callable[[Node, Tensor], None]
) -> None:
    """Run the graph on batches and show `see` what each of the nodes returns; nothing is kept."""
    watcher = _Watcher(graph, nodes, see)
    for batch in batches:
        watcher.run(batch)


def observe(graph: GraphModule, batches: Iterable[Tensor]) -> dict[str, Histogram]:
    """Histograms of all places, by the node's name, from one pass."""
    places = quantized_places(graph)
    histograms = {node.name: Histogram() for node in places}
    watch(graph, places, batches, lambda node, value: histograms[node.name].update(value.numpy(force=True)))
    return histograms


class QuantizeActivation(nn.Module):
    """Rounds to the 256 values of a tensor's scale.

    Args:
        affine: The scale and the zero point.
    """

    scale: Tensor
    zero_point: Tensor

    def __init__(self, affine: Affine) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(affine.scale, dtype=torch.float32))
        self.register_buffer("zero_point", torch.tensor(affine.zero_point, dtype=torch.int32))

    def forward(self, x: Tensor) -> Tensor:
        """Round values of any shape; in float32, whatever the precision around."""
        # PyTorch's own operator multiplies by 1 / scale, the runtimes divide: halves would fall to other sides.
        values = x.float()
        clipped = values.clamp(-self.zero_point * self.scale, (255 - self.zero_point) * self.scale)
        with torch.no_grad():
            codes = (torch.round(values / self.scale) + self.zero_point).clamp(0, 255)
            rounded = (codes - self.zero_point) * self.scale
        return clipped + (rounded - clipped).detach()


class QuantizeWeight(nn.Module):
    """Rounds a weight to -127 to 127 steps per output channel, the largest magnitude being 127 steps.

    Args:
        axis: Of the output channels.
    """

    def __init__(self, axis: int = 0) -> None:
        super().__init__()
        self.axis = axis

    def forward(self, weight: Tensor) -> Tensor:
        """Round (O, ...), or (I, O, ...) where the axis is 1."""
        scale = weight_scales(weight, self.axis)
        zeros = torch.zeros(len(scale), dtype=torch.int32, device=weight.device)  # symmetric
        return torch.fake_quantize_per_channel_affine(weight, scale, zeros, self.axis, -127, 127)


class QuantizeBias(nn.Module):
    """Rounds a bias to multiples of the input's scale times the weight's, as 32-bit accumulators take it.

    Args:
        input_scale: Of the activation that the weight is multiplied with.
        axis: Of the weight's output channels.
    """

    def __init__(self, input_scale: float, axis: int = 0) -> None:
        super().__init__()
        self.input_scale, self.axis = input_scale, axis

    def forward(self, bias: Tensor, weight: Tensor) -> Tensor:
        """Round (O,), given the weight."""
        step = weight_scales(weight, self.axis).double() * self.input_scale
        rounded = (torch.round(bias.detach().double() / step) * step).to(bias.dtype)
        return bias + (rounded - bias).detach()


def weight_scales(weight: Tensor, axis: int = 0) -> Tensor:
    """Scale of each output channel, (O,) float32; any for a channel of zeros."""
    largest = weight.detach().abs().movedim(axis, 0).flatten(1).amax(1)
    return torch.where(largest > 0, largest / 127, torch.ones_like(largest))


def fake_quantized(graph: GraphModule, affines: Mapping[str, Affine]) -> GraphModule:
    """A graph that computes as int8 files with these scales do; it shares the parameters of `graph`.

    Args:
        graph: The float graph (`capture_graph`), batch norms folded.
        affines: By the name of a place; others stay as they are.
    """
    copy = GraphModule(graph, _copied(graph))
    places = {node for node in quantized_places(copy) if node.name in affines}
    for node in list(copy.graph.nodes):
        axis = output_axis(node)
        if axis is not None:
            _quantize_weights(copy, node, axis, places, affines)
    for node in places:
        _insert(copy, node, f"quantize_{node.name}", QuantizeActivation(affines[node.name]))
    copy.graph.lint()
    copy.recompile()
    return copy


def _copied(graph: GraphModule) -> torch.fx.Graph:
    new = torch.fx.Graph()
    copies: dict[Node, Node] = {}
    returned = new.graph_copy(graph.graph, copies)
    new.output(returned)
    for old, copy in copies.items():
        copy.name = old.name
    return new


def output_axis(node: Node) -> int | None:
    """Axis of the output channels in the weight that a node multiplies by; None where it has none of its own.

    Grouped transposed convolutions share their scales between groups in ONNX files, and become several in TFLite.
    """
    if operator(node) in WEIGHTED:
        return 0
    groups = node.args[6] if len(node.args) > 6 else 1
    return 1 if operator(node) in _TRANSPOSED and groups == 1 else None


def _quantize_weights(
    graph: GraphModule, node: Node, axis: int, places: set[Node], affines: Mapping[str, Affine]
) -> None:
    weight = node.args[1]
    if not isinstance(weight, Node) or weight in activation_nodes(graph):
        return
    with graph.graph.inserting_before(node):
        name = f"weight_of_{node.name}"
        graph.add_submodule(name, QuantizeWeight(axis))
        arguments = list(node.args)
        arguments[1] = graph.graph.call_module(name, (weight,))
        source = source_place(node.all_input_nodes[0], places)
        if len(arguments) > 2 and isinstance(arguments[2], Node) and source is not None:
            name = f"bias_of_{node.name}"
            graph.add_submodule(name, QuantizeBias(affines[source.name].scale, axis))
            arguments[2] = graph.graph.call_module(name, (arguments[2], weight))
        node.args = tuple(arguments)


def _insert(graph: GraphModule, node: Node, name: str, module: nn.Module) -> None:
    graph.add_submodule(name, module)
    with graph.graph.inserting_after(node):
        call = graph.graph.call_module(name, (node,))
    node.replace_all_uses_with(call, delete_user_cb=lambda user: user is not call)
