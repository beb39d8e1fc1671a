"""What the network calls the layers of a deployable file."""

from __future__ import annotations

import re
from collections.abc import Sequence

__all__ = ["onnx_layer_name", "tflite_layer_name"]

_WRAPPER = "model"
"""`FlatOutputs`, in which every network is exported, holds it under this name."""


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

    litert-torch names a tensor by the modules that it was made in, 'package.Class_attribute/...', and where operators
    were fused by those of all, joined with semicolons: a convolution's is the layer, not its batch norm's.

    Args:
        tensor_names: Of the operator's output and of its weights.
        place: Of the operator in the file.

    >>> path = "litert_torch.ChannelLastIOWrapper/a.FlatOutputs_model/net.Net_model/torch.nn."
    >>> tflite_layer_name([f"{path}BatchNorm2d_norm;;{path}Conv2d_conv_1;2"], 7)
    'conv_1'
    >>> tflite_layer_name(["serving_default_output_0_output", "arith.constant"], 7)
    'operator 7'
    """
    layers = [layer for name in tensor_names for path in name.split(";") if (layer := _inner_modules(path))]
    for layer in layers:
        if "Conv" in layer[-1].partition("_")[0] or "Linear" in layer[-1].partition("_")[0]:
            return ".".join(map(_attribute, layer))
    deepest = sorted(layers, key=len)[-1] if layers else []
    return ".".join(map(_attribute, deepest)) or f"operator {place}"


def _inner_modules(path: str) -> list[str]:
    """The 'Class_attribute' of the modules inside of the exported network, from the outermost."""
    modules = path.split("/")
    wrapper = next((i for i, module in enumerate(modules) if module.endswith("FlatOutputs_model")), len(modules))
    return [module.rpartition(".")[2] for module in modules[wrapper + 2 :]]  # the next is the network itself


def _attribute(module: str) -> str:
    return module.lstrip("_").partition("_")[2]
