"""Float32 ONNX to int8 ONNX: explicit quantize and dequantize pairs (QDQ) that every ONNX runtime understands."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sepdeploy.core.artifact import Format
from sepdeploy.core.quiet import quiet
from sepdeploy.errors import SepdeployError, ToolError, UsageError
from sepdeploy.quantize.calibration_images import checked_images
from sepdeploy.quantize.inspect_int8 import require_int8_convs
from sepdeploy.quantize.saturation import saturates_u8s8

if TYPE_CHECKING:
    import onnx

__all__ = ["quantize_onnx"]


def quantize_onnx(source: Path, destination: Path, images: Iterable[np.ndarray]) -> None:
    """Write the int8 version of the float32 ONNX file `source` to `destination`.

    Weights are int8, symmetric, one scale per output channel; activations are uint8, asymmetric, one scale per tensor,
    over the full range that they take on `images`. This U8S8 pairing is what onnxruntime fuses on x86 and Arm alike.
    Where this machine saturates in it (`saturates_u8s8`) weights keep to 7 bits, which every machine computes exactly.
    The input and the outputs of the file stay float32. The same images give the same bytes on the same kind of
    processor; memory does not grow with their number.

    Args:
        source: Float32 ONNX file with one input and static shapes.
        destination: The file to write.
        images: Inputs as the file takes them, (1, C, H, W) float32 for images; read once.

    Raises:
        UsageError: if there are no images, or they do not fit the file's input.
        ToolError: if onnxruntime's quantizer fails, or leaves every convolution in float.
        OSError: if `destination` cannot be written.
    """
    try:
        with tempfile.TemporaryDirectory(prefix="sepdeploy-") as folder:
            data = _quantized(source, Path(folder), images)
    except (SepdeployError, OSError):
        raise
    except Exception as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ToolError(f"onnxruntime could not quantize {source}: {reason}") from error
    destination.write_bytes(data)
    require_int8_convs(destination, Format.ONNX)


def _quantized(source: Path, folder: Path, images: Iterable[np.ndarray]) -> bytes:
    import onnx
    from onnxruntime.quantization import QDQQuantizer, QuantType, quant_pre_process

    prepared = folder / "prepared.onnx"
    with quiet():
        # Symbolic inference is for dynamic shapes and needs sympy; ours are static.
        quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
        model = onnx.load(str(prepared))
    name, shape = _single_input(model, source)
    ranges = _calibrated(prepared, folder / "augmented.onnx", name, checked_images(images, shape))
    with quiet():
        # What `quantize_static` does after calibrating. Its own calibration keeps one entry per image and, with
        # CalibMaxIntermediateOutputs, forgets all but the last chunk of images.
        quantizer = QDQQuantizer(
            model,
            per_channel=True,
            reduce_range=saturates_u8s8(),
            weight_qType=QuantType.QInt8,
            activation_qType=QuantType.QUInt8,
            tensors_range=ranges,
            nodes_to_quantize=[],
            nodes_to_exclude=[],
            op_types_to_quantize=_quantizable_op_types(),
            extra_options={"WeightSymmetric": True, "ActivationSymmetric": False},
        )
        quantizer.quantize_model()
        quantizer.model.save_model_to_file(str(folder / "quantized.onnx"))  # this also sorts the nodes
    quantized = onnx.load(str(folder / "quantized.onnx"))
    quantized.ClearField("metadata_props")
    _drop_unused_opsets(quantized)
    data: bytes = quantized.SerializeToString(deterministic=True)
    onnx.checker.check_model(data, full_check=True)
    return data


def _drop_unused_opsets(model: onnx.ModelProto) -> None:
    """Drop the operator sets that onnxruntime's optimizer declares but no node uses: other runtimes reject them."""
    domains = {node.domain for node in model.graph.node}
    used = [opset for opset in model.opset_import if opset.domain in domains]
    del model.opset_import[:]
    model.opset_import.extend(used)


def _single_input(model: onnx.ModelProto, source: Path) -> tuple[str, tuple[int, ...]]:
    constants = {initializer.name for initializer in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in constants]
    if len(inputs) != 1:
        raise UsageError(f"{source} has {len(inputs)} inputs; only networks with one input can be calibrated")
    return inputs[0].name, tuple(dim.dim_value for dim in inputs[0].type.tensor_type.shape.dim)


def _quantizable_op_types() -> list[str]:
    from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry

    return sorted({*QDQRegistry, *QLinearOpsRegistry})


def _calibrated(model_path: Path, augmented_path: Path, input_name: str, images: Iterable[np.ndarray]) -> Any:
    """The smallest and largest value of every activation over all images, as onnxruntime's TensorsData."""
    from onnxruntime.quantization import CalibrationMethod, create_calibrator

    with quiet():
        calibrator = create_calibrator(
            model_path,
            _quantizable_op_types(),
            augmented_model_path=str(augmented_path),
            calibrate_method=CalibrationMethod.MinMax,
        )
    for image in images:
        with quiet():
            calibrator.collect_data(_OneImage({input_name: image}))  # merges the ranges and drops the outputs
    return calibrator.compute_data()


class _OneImage:
    """A calibration data reader, in onnxruntime's terms, with a single image."""

    def __init__(self, feeds: dict[str, np.ndarray]) -> None:
        self._feeds: dict[str, np.ndarray] | None = feeds

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The image the first time, then None."""
        feeds, self._feeds = self._feeds, None
        return feeds
