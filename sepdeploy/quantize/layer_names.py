"""What the network calls the layers of a deployable file."""

from __future__ import annotations

import re
from collections.abc import Sequence

__all__ = ["onnx_layer_name", "tflite_layer_name"]

_WRAPPER = "model"
"""`FlatOutputs`, in which every network is exported, holds it under this name."""

_LAYER = re.compile(rf"(?:.*\.)?(?P<type>\w+)#(?:wrapped\.model\.)?{_WRAPPER}\.(?P<name>.+)")
"""A module in a TFLite file's names; it may be in two more wrappers, for the layout."""


def onnx_layer_name(node_name: str, weight_name: str) -> str:
    """Name of the module whose weight a node reads; of the node if the weight has none of a module's.

    >>> onnx_layer_name("node_conv2d_3", "model.layer1.0.conv1.weight_quantized")
    'layer1.0.conv1'
    >>> onnx_layer_name("node_matmul", "view")
    'matmul'
    """
    found = re.fullmatch(rf"{_WRAPPER}\.(.+)\.weight(_quantized|_DequantizeLinear_Output|_float32)?", weight_name)
    return found[1] if found else node_name.removeprefix("node_")


def tflite_layer_name(tensor_names: Sequence[str], place: int) -> str:
    """Name of the module that an operator stands for; its place in the file if there is none.

    `export_tflite` names a tensor by the module that it was made in, 'package.Class#module.name', and where operators
    were fused by those of all, joined with semicolons: a convolution's is the layer, not its batch norm's.

    Args:
        tensor_names: Of the operator's output and of its weights.
        place: Of the operator in the file.

    >>> tflite_layer_name(["torch.nn.BatchNorm2d#model.stages.0.norm;torch.nn.Conv2d#model.stages.0.conv_1;2"], 7)
    'stages.0.conv_1'
    >>> tflite_layer_name(["net.ConvBlock#model.0;torch.nn.Conv2d#model.0.conv;1"], 7)
    '0.conv'
    >>> tflite_layer_name(["serving_default_output_0_output", "arith.constant"], 7)
    'operator 7'
    """
    layers = [layer for name in tensor_names for path in name.split(";") if (layer := _LAYER.fullmatch(path))]
    names = [layer["name"] for layer in layers]
    for layer in layers:
        is_layer = "Conv" in layer["type"] or "Linear" in layer["type"]
        # A 'ConvBlock' around the convolution is called like one too.
        if is_layer and not any(name.startswith(f"{layer['name']}.") for name in names):
            return layer["name"]
    return max(names, key=lambda name: name.count("."), default=f"operator {place}")
