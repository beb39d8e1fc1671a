"""Cuts a file into prefixes, its first operators alone, wherever that tears nothing apart that a runtime fuses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sepdeploy.errors import ToolError

__all__ = ["Prefix", "keep_operators", "layer_of_tensor", "write_prefixes"]

_ACTIVATIONS = {
    *("Clip", "Elu", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Mul", "PRelu", "Relu", "Sigmoid", "Tanh"),
}
"""What ONNX Runtime may fuse into the operator before it."""

_MOST_LETTERS = 60

_SUMS = {"Add", "BatchNormalization"}


@dataclass(frozen=True, slots=True)
class Prefix:
    """The operators of a file up to some place, as a file of its own.

    Attributes:
        name: The last operator, with those before it that belong to the same cut.
        path: The file; the whole file itself is the last prefix.
    """

    name: str
    path: Path


def write_prefixes(source: Path, folder: Path) -> list[Prefix]:
    """Write all prefixes of an ONNX or TFLite file, the shortest first; the last one is `source` itself.

    Raises:
        ToolError: if the file cannot be taken apart.
    """
    writer = _tflite_prefixes if source.suffix.lower() == ".tflite" else _onnx_prefixes
    try:
        return writer(source, folder)
    except ImportError as error:
        raise ToolError(f"{source} cannot be taken apart: {error}") from error


def _tflite_prefixes(source: Path, folder: Path) -> list[Prefix]:
    from ai_edge_litert import schema_py_generated as schema
    from ai_edge_litert.tools import flatbuffer_utils

    names = {value: name for name, value in vars(schema.BuiltinOperator).items() if isinstance(value, int)}
    whole = flatbuffer_utils.read_model(str(source))
    if len(whole.subgraphs) != 1:
        raise ToolError(f"{source} has {len(whole.subgraphs)} subgraphs; only files with one can be taken apart")
    graph = whole.subgraphs[0]
    codes = [max(code.builtinCode, code.deprecatedBuiltinCode) for code in whole.operatorCodes]
    labels = []
    for operator in graph.operators:
        tensor = (graph.tensors[operator.outputs[0]].name or b"").decode(errors="replace")
        labels.append(f"{names.get(codes[operator.opcodeIndex], 'CUSTOM')} {layer_of_tensor(tensor)}".strip())
    prefixes = []
    for end in range(1, len(graph.operators)):
        made = {output for operator in graph.operators[:end] for output in operator.outputs}
        later = {tensor for operator in graph.operators[end:] for tensor in operator.inputs} | set(graph.outputs)
        model = flatbuffer_utils.read_model(str(source))  # anew: cutting changes it
        model.signatureDefs = []
        keep_operators(model, sorted(made & later))
        path = folder / f"prefix-{end}.tflite"
        flatbuffer_utils.write_model(model, str(path))
        prefixes.append(Prefix(labels[end - 1], path))
    return [*prefixes, Prefix(labels[-1], source)]


def layer_of_tensor(name: str) -> str:
    """The layer that a tensor of a TFLite file comes from.

    litert-torch names tensors by the modules around them, 'package.Class_attribute' each, with those of the export
    outside; where operators were fused several such names are joined by ';'.

    >>> layer_of_tensor("litert_torch.Wrapper/sepdeploy.export.Flat_model/nets.Net_model/nn.Sequential_a/nn.Conv2d_0;1")
    'a.0'
    >>> layer_of_tensor("model/conv2d/Relu"), layer_of_tensor("serving_default:0")
    ('conv2d.Relu', 'serving_default:0')
    """
    path = max(name.split(";"), key=len).split("/")
    own = [part for part in path if not part.startswith(("litert_torch.", "sepdeploy.export."))]
    attributes = []
    for part in own[1:]:  # the first is the network itself
        package, _, last = part.rpartition(".")
        attributes.append(last.lstrip("_").partition("_")[2] if package else last)
    return ".".join(attribute for attribute in attributes if attribute) or name[-_MOST_LETTERS:]


def keep_operators(model: Any, outputs: Sequence[int]) -> None:
    """Leave of a TFLite model with one subgraph only what the tensors `outputs` depend on; in place.

    Its inputs stay. Ends of its signatures have to be among the inputs and `outputs`.
    """
    (graph,) = model.subgraphs
    graph.outputs = list(outputs)
    needed = set(outputs)
    operators = []
    for operator in reversed(graph.operators):
        if needed.intersection(operator.outputs):
            needed.update(operator.inputs, operator.outputs)
            operators.append(operator)
    graph.operators = operators[::-1]
    tensors = _numbered({*needed, *graph.inputs} - {-1})  # -1: an input left out
    graph.tensors = [graph.tensors[old] for old in tensors]
    graph.inputs, graph.outputs = ([tensors[old] for old in ends] for ends in (graph.inputs, graph.outputs))
    for operator in operators:
        operator.inputs = [tensors.get(old, -1) for old in operator.inputs]
        operator.outputs = [tensors[old] for old in operator.outputs]
    for signature in model.signatureDefs or ():
        for end in (*signature.inputs, *signature.outputs):
            end.tensorIndex = tensors[end.tensorIndex]
    model.metadata = []
    buffers = _numbered({0, *(tensor.buffer for tensor in graph.tensors)})  # 0: the empty one of all activations
    model.buffers = [model.buffers[old] for old in buffers]
    for tensor in graph.tensors:
        tensor.buffer = buffers[tensor.buffer]


def _numbered(old: set[int]) -> dict[int, int]:
    """Old number -> new one, without gaps, in the same order."""
    return {number: place for place, number in enumerate(sorted(old))}


def _onnx_prefixes(source: Path, folder: Path) -> list[Prefix]:
    import onnx

    model = onnx.shape_inference.infer_shapes(onnx.load(source))
    graph = model.graph
    types = {value.name: value for value in (*graph.value_info, *graph.output, *graph.input)}
    nodes = _computing_nodes(graph)
    is_quantized = any(node.op_type == "QuantizeLinear" for node in graph.node)
    readers: dict[str, list[Any]] = {}
    for node in nodes:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    results = {output.name for output in graph.output}
    prefixes = []
    pending: list[str] = []
    for end, node in enumerate(nodes[:-1], 1):
        if node.op_type not in {"QuantizeLinear", "DequantizeLinear"}:
            pending.append(f"{node.op_type} {node.name or node.output[0]}")
        made = [output for each in nodes[:end] for output in each.output]
        later = {name for each in nodes[end:] for name in each.input} | results
        frontier = [name for name in made if name in later]
        producers = {output: each for each in nodes[:end] for output in each.output}
        if not pending or not all(
            _may_end(producers[name], readers.get(name, []), is_quantized=is_quantized) and name in types
            for name in frontier
        ):
            continue
        path = folder / f"prefix-{end}.onnx"
        onnx.save(_onnx_part(model, [types[name] for name in frontier]), path)
        prefixes.append(Prefix(", ".join(pending), path))
        pending = []
    last = nodes[-1]
    return [*prefixes, Prefix(", ".join((*pending, f"{last.op_type} {last.name or last.output[0]}")), source)]


def _computing_nodes(graph: Any) -> list[Any]:
    """Nodes that depend on an input; the others, such as the dequantization of weights, are constants."""
    initializers = {initializer.name for initializer in graph.initializer}
    varying = {value.name for value in graph.input} - initializers
    nodes = []
    for node in graph.node:
        if varying.intersection(node.input):
            varying.update(node.output)
            nodes.append(node)
    return nodes


def _may_end(producer: Any, readers: Sequence[Any], *, is_quantized: bool) -> bool:
    """Whether a file may end in what `producer` gives without tearing apart what is one kernel."""
    if is_quantized:
        return bool(producer.op_type == "DequantizeLinear")
    fused = _ACTIVATIONS | (_SUMS if producer.op_type == "Conv" else set())
    return not (len(readers) == 1 and readers[0].op_type in fused)


def _onnx_part(model: Any, outputs: Sequence[Any]) -> Any:
    """The part of an ONNX model that `outputs` (value infos) depend on."""
    import onnx

    part = onnx.ModelProto()
    part.CopyFrom(model)
    needed = {value.name for value in outputs}
    nodes = []
    for node in reversed(model.graph.node):
        if needed.intersection(node.output):
            needed.update(node.input)
            nodes.append(node)
    initializers = [each for each in model.graph.initializer if each.name in needed]
    for field, values in (("node", nodes[::-1]), ("output", outputs), ("initializer", initializers)):
        part.graph.ClearField(field)
        getattr(part.graph, field).extend(values)
    part.graph.ClearField("value_info")
    return part
