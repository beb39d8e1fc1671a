"""Whether this machine computes uint8 x int8 products exactly."""

from __future__ import annotations

from functools import cache

import numpy as np

__all__ = ["saturates_u8s8"]

_CHANNELS = 64


@cache
def saturates_u8s8() -> bool:
    """Whether onnxruntime's uint8 x int8 convolution saturates on this processor.

    x86 cores without VNNI or AMX multiply with `vpmaddubsw`, which adds pairs of products in 16 bits: 2 * 255 * 127
    does not fit, and full-range weights silently give wrong sums. Weights of 7 bits always fit. This runs the largest
    products through the runtime instead of guessing from the processor's name.
    """
    import onnx
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    # One output of value 1.0 from the largest codes, 255 and 127, in the form that the runtime fuses to one operator.
    scale = np.float32(1 / (255 * 127 * _CHANNELS))
    constants = {
        "one": np.float32(1.0),
        "zero_u8": np.uint8(0),
        "w": np.full((_CHANNELS, _CHANNELS, 1, 1), 127, np.int8),
        "w_scale": np.full(_CHANNELS, scale, np.float32),
        "w_zero": np.zeros(_CHANNELS, np.int8),
        "y_scale": np.float32(1 / 128),
    }
    nodes = [
        helper.make_node("DequantizeLinear", ["x", "one", "zero_u8"], ["x_float"]),
        helper.make_node("DequantizeLinear", ["w", "w_scale", "w_zero"], ["w_float"], axis=0),
        helper.make_node("Conv", ["x_float", "w_float"], ["y_float"]),
        helper.make_node("QuantizeLinear", ["y_float", "y_scale", "zero_u8"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "probe",
        [helper.make_tensor_value_info("x", TensorProto.UINT8, [1, _CHANNELS, 4, 4])],
        [helper.make_tensor_value_info("y", TensorProto.UINT8, [1, _CHANNELS, 4, 4])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    # IR version 8 goes with operator set 13: any onnxruntime of the last years takes them.
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": np.full((1, _CHANNELS, 4, 4), 255, np.uint8)})
    return bool((found != 128).any())
