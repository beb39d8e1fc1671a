"""The data flow of a network as a graph of functional operators that can be run, read and rewritten.

`torch.export` captures it, as the exporters of both file formats do: what they can write down has such a graph. Its
parameters are those of the network itself, under the same names; operators in place have become functional ones.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.graph import CodeGen

from sepdeploy.core.quiet import first_line, quiet
from sepdeploy.errors import UnsupportedModelError

__all__ = [
    "MOVING",
    "WEIGHTED",
    "activation_nodes",
    "attribute",
    "capture_graph",
    "fixed_batch_size",
    "operator",
    "sole_reader",
]

MOVING = frozenset(
    {
        *("alias", "clone", "contiguous", "detach", "dropout", "expand", "feature_dropout", "flatten", "flip"),
        *("index", "index_select", "narrow", "permute", "pixel_shuffle", "pixel_unshuffle", "channel_shuffle"),
        *("reshape", "roll", "select", "slice", "split", "split_with_sizes", "chunk", "unbind", "squeeze", "t"),
        *("transpose", "unsqueeze", "view", "_unsafe_view", "movedim", "numpy_T", "lift_fresh_copy", "unflatten"),
        *("cat", "stack", "constant_pad_nd", "pad", "getitem"),
    }
)
"""Operators that move values and change none (but for the zeros of a padding)."""

WEIGHTED = frozenset({"conv1d", "conv2d", "conv3d", "linear"})
"""Operators that multiply by weights, (input, weight, bias, ...)."""


def capture_graph(network: nn.Module, example: Tensor) -> GraphModule:
    """The graph of `network` in eval mode, for any number of images where it allows that.

    It returns the tensors in the network's outputs as a flat tuple, in pytree order.

    Args:
        network: In eval mode; its parameters are shared by the graph.
        example: Input of one image or more, (N, ...).

    Raises:
        UnsupportedModelError: if it cannot be captured.
    """
    batch = torch.cat([example, example])[:2] if len(example) < 2 else example  # of one image the number is fixed
    try:
        graph = _captured(network, batch, ({0: torch.export.Dim.AUTO},))
        if fixed_batch_size(graph) is not None:
            graph = _captured(network, example[:1], None)
    except Exception as error:  # whatever Python code in a forward pass may do to it
        try:
            graph = _captured(network, example[:1], None)  # it may have the number of images written into it
        except Exception:
            raise UnsupportedModelError(
                f"the data flow of the network cannot be captured: {first_line(error)}; rewrite that part of its "
                "forward method"
            ) from error
    for node in list(graph.graph.nodes):
        if node.op == "call_module" and not node.users:  # checks of the input's shape
            graph.graph.erase_node(node)
    graph.graph.set_codegen(CodeGen())
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def _captured(network: nn.Module, batch: Tensor, dynamic_shapes: Any) -> GraphModule:
    with quiet(), torch.no_grad():
        program = torch.export.export(network, (batch,), dynamic_shapes=dynamic_shapes)
        program = program.run_decompositions({torch.ops.aten.silu.default: _silu})
        graph: Any = program.module()
    module: GraphModule = graph
    return module


def _silu(x: Tensor) -> Tensor:
    """As the exporters write it down: files have the sigmoid as a tensor of its own."""
    return x * torch.sigmoid(x)


def fixed_batch_size(graph: GraphModule) -> int | None:
    """How many images the graph takes at a time; None if any number."""
    from torch.fx.experimental.symbolic_shapes import is_concrete_int

    (first, *_) = (node for node in graph.graph.nodes if node.op == "placeholder")
    size = first.meta["val"].shape[0]
    return int(size) if is_concrete_int(size) else None  # a symbol too may have been found to be a number


def operator(node: Node) -> str:
    """The name of the operator of a node, such as 'conv2d'; empty where it is none."""
    if node.op != "call_function":
        return ""
    packet = getattr(node.target, "overloadpacket", node.target)
    return str(getattr(packet, "__name__", packet))


def attribute(graph: GraphModule, node: object) -> Tensor | None:
    """The parameter or buffer that a node is; None if it is anything else."""
    if not isinstance(node, Node) or node.op != "get_attr":
        return None
    value: object = graph
    for part in str(node.target).split("."):
        value = getattr(value, part, None)
    return value if isinstance(value, Tensor) else None


def activation_nodes(graph: GraphModule) -> set[Node]:
    """Nodes whose values depend on the input."""
    found: set[Node] = set()
    for node in graph.graph.nodes:
        if node.op == "placeholder" or (node.op != "output" and any(each in found for each in node.all_input_nodes)):
            found.add(node)
    return found


def sole_reader(node: Node) -> Node | None:
    """The one node that alone reads `node`."""
    return next(iter(node.users)) if len(node.users) == 1 else None
