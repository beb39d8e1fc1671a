"""Exact rewrites of an ONNX graph, from operators that runtimes only have in float32 to those they have in int8.

Each rule looks at one node and returns the nodes to put in its place, or None to leave it alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import onnx

__all__ = ["rewrite_for_int8"]


def rewrite_for_int8(model: onnx.ModelProto) -> bool:
    """Rewrite the graph of `model` in place.

    Means over the image become pooling, gathers that move nothing reshapes, squares products, and average pooling
    without padding counts none. Runtimes compute GlobalAveragePool, Reshape and Mul on integers, but ReduceMean, Gather
    and Pow between two conversions to float32. The outputs change by float32 rounding at most.

    Args:
        model: A simplified network with static shapes: the arguments of its operators are initializers.

    Returns:
        Whether anything was rewritten. If so, simplify again: reshapes may follow each other and constants go unread.
    """
    graph = model.graph
    view = _View(model)
    rules: dict[str, Callable[[onnx.NodeProto, _View], list[onnx.NodeProto] | None]] = {
        "ReduceMean": _pool_mean,
        "Gather": _reshape_gather,
        "AveragePool": _count_what_is_there,
        "Pow": _multiply_square,
    }
    nodes: list[onnx.NodeProto] = []
    is_changed = False
    for node in graph.node:
        rule = rules.get(node.op_type)
        replacement = rule(node, view) if rule is not None else None
        is_changed |= replacement is not None
        nodes.extend([node] if replacement is None else replacement)
    if is_changed:
        del graph.node[:]
        graph.node.extend(nodes)
        graph.initializer.extend(view.new_constants)
    return is_changed


class _View:
    """Shapes and constants of a graph, and the constants that the rules add to it."""

    def __init__(self, model: onnx.ModelProto) -> None:
        from onnx import shape_inference

        graph = shape_inference.infer_shapes(model).graph
        self._constants = {initializer.name: initializer for initializer in graph.initializer}
        values = (*graph.input, *graph.value_info, *graph.output)
        dims = {value.name: value.type.tensor_type.shape.dim for value in values}
        self._shapes = {
            name: tuple(int(dim.dim_value) for dim in shape)
            for name, shape in dims.items()
            if all(dim.HasField("dim_value") for dim in shape)
        }
        self._shapes |= {name: tuple(constant.dims) for name, constant in self._constants.items()}
        self._names = {*self._shapes, *dims, *(output for node in graph.node for output in node.output)}
        self.new_constants: list[onnx.TensorProto] = []

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Shape of a tensor, None if it is not known."""
        return self._shapes.get(name)

    def integers(self, name: str) -> np.ndarray | None:
        """Values of an integer constant, None if the tensor is anything else."""
        from onnx import numpy_helper

        if name not in self._constants:
            return None
        values = numpy_helper.to_array(self._constants[name])
        return values if np.issubdtype(values.dtype, np.integer) else None

    def is_number(self, name: str, number: float) -> bool:
        """Whether a tensor is a constant with `number` as its only value."""
        from onnx import numpy_helper

        values = numpy_helper.to_array(self._constants[name]) if name in self._constants else np.empty(0)
        return values.size == 1 and float(values.item()) == number

    def new_name(self, stem: str) -> str:
        """A name that no tensor has."""
        name = stem
        while name in self._names:
            name += "_"
        self._names.add(name)
        return name

    def add_shape_constant(self, shape: tuple[int, ...], stem: str) -> str:
        """Name of a new constant that holds `shape`."""
        from onnx import numpy_helper

        name = self.new_name(stem)
        self.new_constants.append(numpy_helper.from_array(np.array(shape, np.int64), name))
        return name


def _pool_mean(node: onnx.NodeProto, view: _View) -> list[onnx.NodeProto] | None:
    """The mean over height and width of (N, C, H, W) is the global average pool; without keepdims, flattened."""
    from onnx import helper

    axes = view.integers(node.input[1]) if len(node.input) == 2 else None
    shape = view.shape(node.input[0])
    if axes is None or shape is None or len(shape) != 4 or sorted(axes.ravel() % 4) != [2, 3]:
        return None
    if _attribute(node, "keepdims", default=1):
        return [helper.make_node("GlobalAveragePool", node.input[:1], node.output, node.name)]
    pooled = view.new_name(f"{node.output[0]}_pooled")
    return [
        helper.make_node("GlobalAveragePool", node.input[:1], [pooled], node.name),
        helper.make_node("Flatten", [pooled], node.output, f"{node.name}_flatten", axis=1),
    ]


def _reshape_gather(node: onnx.NodeProto, view: _View) -> list[onnx.NodeProto] | None:
    """Gathering 0, 1, ..., n - 1 from an axis of size n only reshapes; adaptive_avg_pool2d exports one of these."""
    from onnx import helper

    indices, shape, output_shape = view.integers(node.input[1]), view.shape(node.input[0]), view.shape(node.output[0])
    if indices is None or shape is None or output_shape is None or 0 in output_shape:
        return None
    if not np.array_equal(indices.ravel(), np.arange(shape[_attribute(node, "axis", default=0)])):
        return None
    target = view.add_shape_constant(output_shape, f"{node.output[0]}_shape")
    return [helper.make_node("Reshape", [node.input[0], target], node.output, node.name)]


def _count_what_is_there(node: onnx.NodeProto, _view: _View) -> list[onnx.NodeProto] | None:
    """Without padding there is none to be counted; told to, onnxruntime's int8 kernel counts what is beyond the image.

    With `ceil_mode`, the last window may end there.
    """
    from onnx import NodeProto

    pads = next((attribute.ints for attribute in node.attribute if attribute.name == "pads"), ())
    if not _attribute(node, "count_include_pad", default=0) or any(pads):
        return None
    counting = NodeProto()
    counting.CopyFrom(node)
    del counting.attribute[:]
    counting.attribute.extend(each for each in node.attribute if each.name != "count_include_pad")
    return [counting]


def _multiply_square(node: onnx.NodeProto, view: _View) -> list[onnx.NodeProto] | None:
    """A square is a product."""
    from onnx import helper

    shape = view.shape(node.input[1])
    if not view.is_number(node.input[1], 2.0) or shape is None or len(shape) > len(view.shape(node.input[0]) or ()):
        return None
    return [helper.make_node("Mul", [node.input[0], node.input[0]], node.output, node.name)]


def _attribute(node: onnx.NodeProto, name: str, *, default: int) -> int:
    return next((int(attribute.i) for attribute in node.attribute if attribute.name == name), default)
