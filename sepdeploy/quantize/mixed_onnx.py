"""An int8 ONNX file with some layers back in float, or with int8 weights only; all else as it was."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from sepdeploy.core.mixed import Arithmetic, is_within
from sepdeploy.quantize.int8_share import ONNX_LAYERS, weights_of_onnx
from sepdeploy.quantize.layer_names import onnx_layer_name

if TYPE_CHECKING:
    import onnx

__all__ = ["is_copy", "mix_onnx"]

_ACTIVATIONS = frozenset({"Relu", "Clip"})
_CONVERSIONS = frozenset({"QuantizeLinear", "DequantizeLinear"})


def mix_onnx(
    source: Path, int8: Path, destination: Path, kept: Mapping[str, Arithmetic], *, is_block: bool = False
) -> frozenset[str]:
    """Write the int8 file with the layers in `kept` computed in float.

    A layer's weights come from the float file, or stay in int8 and are dequantized before use. Between two such
    layers nothing is converted, and operators without weights that only they read are in float as well; from and to
    layers in int8 there are the conversions that were there before. Ranges, weights and everything else of the
    other layers are those of `int8`.

    Args:
        source: The float32 file that `int8` was quantized from.
        int8: A file in QDQ form.
        destination: The file to write.
        kept: Layer of the network -> how it computes; '' stands for all.
        is_block: Whether the file stands for a layer inside of a network: then its input counts as converted too.

    Returns:
        The layers in `kept` of which `int8` has no operator that could be put back.
    """
    import onnx

    model, float_graph = onnx.load(str(int8)), onnx.load(str(source)).graph
    mixer = _Mixer(model.graph, float_graph)
    unknown = frozenset(name for name, arithmetic in kept.items() if not mixer.put_back(name, arithmetic))
    mixer.finish(is_block=is_block)
    data: bytes = model.SerializeToString(deterministic=True)
    onnx.checker.check_model(data, full_check=True)
    destination.write_bytes(data)
    return unknown


class _Mixer:
    """Edits a QDQ graph in place."""

    def __init__(self, graph: onnx.GraphProto, float_graph: onnx.GraphProto) -> None:
        self.graph = graph
        self._float_nodes = {node.name: node for node in float_graph.node}
        self._float_constants = {constant.name: constant for constant in float_graph.initializer}
        self._float_readers = _readers(float_graph.node)
        weights = weights_of_onnx(graph)
        self._layers = {  # name of each operator with weights -> its layer
            node.name: onnx_layer_name(node.name, weights[node.output[0]])
            for node in graph.node
            if node.op_type in ONNX_LAYERS
        }
        self._in_float: dict[str, str] = {}  # name of each layer in float -> the tensor that it returns
        self._added: dict[str, onnx.TensorProto] = {}

    def put_back(self, name: str, arithmetic: Arithmetic) -> bool:
        """Put all operators of a layer back; whether there was one."""
        found = [n for n in self.graph.node if n.name in self._layers and is_within(self._layers[n.name], name)]
        done = [self._put_back(node, arithmetic) for node in found]
        return any(done)

    def _put_back(self, node: onnx.NodeProto, arithmetic: Arithmetic) -> bool:
        """Let a layer read float weights, or dequantized ones, and give its activation back to it."""
        known = self._float_nodes.get(node.name)
        if known is None or known.op_type != node.op_type or known.input[1] not in self._float_constants:
            return False
        if not self._restore_activations(node, known):
            return False
        for place, original in list(enumerate(known.input))[1:]:
            if place > 1 or arithmetic is Arithmetic.FLOAT32:
                node.input[place] = self._constant(original)
        return True

    def _restore_activations(self, node: onnx.NodeProto, known: onnx.NodeProto) -> bool:
        """Put the activations behind a node that quantizing took away; whether there is a way to its output."""
        returned = node.output[0]
        activations = self._activations(known.output[0], returned.removesuffix("_QuantizeLinear_Input"))
        if activations is None:
            return False
        self._in_float[node.name] = returned
        place = list(self.graph.node).index(node)
        for activation in activations:
            added = type(node)()
            added.CopyFrom(activation)
            for i, original in list(enumerate(activation.input))[1:]:
                added.input[i] = self._constant(original)
            node.output[0] = added.input[0] = f"{returned}_before_{activation.name}"
            added.output[0] = returned
            place += 1
            self.graph.node.insert(place, added)
            node = self.graph.node[place]
        return True

    def _pull_in(self) -> None:
        """Put operators without weights in float that only operators in float read."""
        for node in reversed(list(self.graph.node)):
            known = self._float_nodes.get(node.name)
            is_other = node.op_type not in {*ONNX_LAYERS, *_CONVERSIONS}
            if known is None or not is_other or len(node.output) != 1:
                continue
            names = self._reading(node.output[0])
            if names and names <= self._in_float.keys():
                self._restore_activations(node, known)

    def _reading(self, name: str) -> set[str]:
        """Names of the operators that read a tensor, through conversions; '' for what the file returns."""
        readers = _readers(self.graph.node)
        outputs = {output.name for output in self.graph.output}
        open_names, found = [name], set()
        while open_names:
            name = open_names.pop()
            if name in outputs:
                found.add("")
            for reader in readers.get(name, []):
                if reader.op_type in _CONVERSIONS:
                    open_names.extend(reader.output)
                else:
                    found.add(reader.name)
        return found

    def _activations(self, start: str, end: str) -> list[onnx.NodeProto] | None:
        """The activations from one tensor of the float graph to another, which quantizing took away; None if others."""
        path: list[onnx.NodeProto] = []
        while start != end:
            readers = self._float_readers.get(start, [])
            if len(readers) != 1 or readers[0].op_type not in _ACTIVATIONS:
                return None
            path.append(readers[0])
            start = readers[0].output[0]
        return path

    def _constant(self, name: str) -> str:
        """Name, in the int8 graph, of a constant of the float graph."""
        if not name or name not in self._float_constants:
            return name  # left out, as the lower bound of a Clip
        new_name = f"{name}_float32"
        if new_name not in self._added:
            constant = type(self._float_constants[name])()
            constant.CopyFrom(self._float_constants[name])
            constant.name = new_name
            self._added[new_name] = constant
        return new_name

    def finish(self, *, is_block: bool) -> None:
        """Let operators in float read each other's tensors as they are, and drop what nothing reads any more."""
        graph = self.graph
        self._pull_in()
        graph.initializer.extend(self._added.values())
        quantized = {node.output[0]: node.input[0] for node in graph.node if node.op_type == "QuantizeLinear"}
        behind = {
            node.output[0]: quantized[node.input[0]]
            for node in graph.node
            if node.op_type == "DequantizeLinear" and node.input[0] in quantized
        }
        raw = set(self._in_float.values())
        if not is_block:
            raw.update(value.name for value in graph.input)
        dequantized = {node.output[0] for node in graph.node if node.op_type == "DequantizeLinear"}
        barriers: dict[str, str] = {}
        nodes = list(graph.node)
        del graph.node[:]
        for node in nodes:
            for place, name in enumerate(node.input if node.name in self._in_float else ()):
                if behind.get(name) in raw:
                    node.input[place] = behind[name]
                elif place == 0 and node.op_type in ONNX_LAYERS and name in dequantized:
                    if name not in barriers:
                        barriers[name] = f"{name}_float32"
                        graph.node.append(_barrier(name, barriers[name]))
                    node.input[place] = barriers[name]
            graph.node.append(node)
        _drop_unread(graph)


def _barrier(name: str, copy: str) -> onnx.NodeProto:
    """A copy of a tensor, as an operator that onnxruntime leaves alone.

    Right behind a DequantizeLinear it would quantize the layer's weights by itself, and compute in int8 after all.
    """
    from onnx import helper

    return helper.make_node("Max", [name], [copy], f"{copy}_copy")


def is_copy(node: onnx.NodeProto) -> bool:
    """Whether a node does nothing but copy a tensor, as `mix_onnx` puts some in."""
    return node.op_type == "Max" and len(node.input) == 1


def _readers(nodes: Iterable[onnx.NodeProto]) -> dict[str, list[onnx.NodeProto]]:
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in nodes:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    return readers


def _drop_unread(graph: onnx.GraphProto) -> None:
    """Drop operators, constants and notes of shapes that no output depends on."""
    needed = {output.name for output in graph.output}
    nodes: list[onnx.NodeProto] = []
    for node in reversed(graph.node):
        if needed.intersection(node.output):
            needed.update(node.input)
            nodes.insert(0, node)
    del graph.node[:]
    graph.node.extend(nodes)
    constants = [constant for constant in graph.initializer if constant.name in needed]
    del graph.initializer[:]
    graph.initializer.extend(constants)
    del graph.value_info[:]
