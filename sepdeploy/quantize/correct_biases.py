"""Take the mean error that rounded weights make back through the biases."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from sepdeploy.analyze.flow_graph import WEIGHTED, attribute, capture_graph, operator
from sepdeploy.core.int8 import Affine
from sepdeploy.quantize.simulate import fake_quantized

__all__ = ["correct_biases", "float_weight"]


@torch.no_grad()
def correct_biases(
    network: nn.Module, example: Tensor, affines: Mapping[str, Affine], batches: Callable[[], Iterable[Tensor]]
) -> str:
    """Subtract from each bias the mean difference that rounding its layer's weights makes; in place.

    On the inputs that the layer gets in the int8 network, averaged over images and positions, per output channel
    (Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", 2019, section 4.2, with
    real inputs in the place of their expectation). One streamed pass.

    Returns:
        What was done, for the user; empty if there is no bias to correct.
    """
    graph = capture_graph(network, example)
    observer = _MeanError(fake_quantized(graph, affines))
    for batch in batches():
        observer.run(batch)
    for bias, total, count in observer.errors.values():
        bias -= (total / count).to(bias.dtype)
    count = len(observer.errors)
    return f"{count} {'bias' if count == 1 else 'biases'}" if count else ""


class _MeanError(Interpreter):
    """Sums, per bias, how far outputs with rounded weights are from those with the given ones.

    Attributes:
        errors: By the bias's id: the bias, the sum (O,) float64, and how many values were added.
    """

    def __init__(self, graph: GraphModule) -> None:
        super().__init__(graph)
        self._graph = graph
        self.errors: dict[int, tuple[Tensor, Tensor, int]] = {}

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        weight, bias = float_weight(self._graph, n), _bias(self._graph, n)
        if weight is not None and bias is not None and operator(n) in WEIGHTED:
            args = list(self.fetch_args_kwargs_from_env(n)[0])
            rounded = result.double()
            args[1] = weight
            exact = n.target(*args)  # type: ignore[operator]
            axis = -1 if operator(n) == "linear" else result.dim() - weight.dim() + 1
            difference = (rounded - exact).movedim(axis, 0).flatten(1)
            _, total, count = self.errors.get(id(bias), (bias, 0.0, 0))
            self.errors[id(bias)] = (bias, total + difference.sum(1), count + difference.shape[1])
        return result


def float_weight(graph: GraphModule, node: Node) -> Tensor | None:
    """The parameter whose rounded values a node of a simulated network multiplies by."""
    return _behind(graph, node, 1)


def _bias(graph: GraphModule, node: Node) -> Tensor | None:
    return _behind(graph, node, 2)


def _behind(graph: GraphModule, node: Node, place: int) -> Tensor | None:
    if operator(node) not in WEIGHTED or len(node.args) <= place:
        return None
    argument = node.args[place]
    if isinstance(argument, Node) and argument.op == "call_module":  # its rounding
        argument = argument.args[0]
    return attribute(graph, argument)
