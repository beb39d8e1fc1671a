"""Float32 files to files with float16 weights: half the size, next to no loss."""

from __future__ import annotations

from pathlib import Path

from sepdeploy.core.artifact import Format
from sepdeploy.core.quiet import first_line, quiet, silenced_native_stderr
from sepdeploy.errors import ToolError
from sepdeploy.quantize.int8_share import ONNX_LAYERS
from sepdeploy.quantize.running_graph import running_graph

__all__ = ["computes_in_float16", "convert_to_float16"]


def convert_to_float16(source: Path, destination: Path, file_format: Format) -> None:
    """Write the float32 file `source` with weights in float16 to `destination`.

    An ONNX file has all its tensors but input and outputs in float16. A TFLite file has only its weights so, and
    turns them into float32 before they are used. The input and the outputs stay float32. Weights beyond float16's range
    become its largest number.

    Raises:
        ToolError: if the converter fails or is not installed.
        OSError: if `destination` cannot be written.
    """
    try:
        data = _onnx(source) if file_format is Format.ONNX else _tflite(source)
    except ImportError as error:
        raise ToolError(
            f"ai-edge-quantizer cannot be imported ({error}); "
            "run pip install 'sepdeploy[tflite]', or leave TFLite out with --formats onnx"
        ) from error
    except OSError:
        raise
    except Exception as error:  # of types of their own
        raise ToolError(
            f"{source} cannot be converted to float16: {first_line(error)}; leave float16 out of --precisions"
        ) from error
    destination.write_bytes(data)


def _onnx(source: Path) -> bytes:
    import onnx
    from onnxruntime.quantization.onnx_model import ONNXModel
    from onnxruntime.transformers.float16 import convert_float_to_float16

    with quiet():
        converted = ONNXModel(convert_float_to_float16(onnx.load(str(source)), keep_io_types=True))
        converted.topological_sort()  # the casts of the input come last otherwise
    data: bytes = converted.model.SerializeToString(deterministic=True)
    onnx.checker.check_model(data, full_check=True)
    return data


def _tflite(source: Path) -> bytes:
    with quiet():
        from ai_edge_quantizer import qtyping, quantizer, recipe_manager
        from ai_edge_quantizer.algorithm_manager import AlgorithmName

        recipes = recipe_manager.RecipeManager()
        recipes.add_weight_only_config(
            regex=".*",
            operation_name=qtyping.TFLOperationName.ALL_SUPPORTED,
            num_bits=16,
            algorithm_key=AlgorithmName.FLOAT_CASTING,
        )
        with silenced_native_stderr():
            float16 = quantizer.Quantizer(str(source), recipes.get_quantization_recipe())
            return bytes(float16.quantize(enable_progress_report=False).quantized_model)


def computes_in_float16(path: Path, file_format: Format) -> bool:
    """Whether this machine computes any convolution or matrix product of a float16 file in float16.

    onnxruntime has no float16 kernels for them on most processors: it turns values into float32 and back. A TFLite
    file of `convert_to_float16` turns its weights into float32 itself.
    """
    if file_format is Format.TFLITE:
        return False
    import onnx

    graph = running_graph(path)
    halves = {constant.name for constant in graph.initializer if constant.data_type == onnx.TensorProto.FLOAT16}
    kinds = {*ONNX_LAYERS, "FusedConv", "FusedGemm", "FusedMatMul"}
    return any(node.op_type in kinds and node.input[1] in halves for node in graph.node)
