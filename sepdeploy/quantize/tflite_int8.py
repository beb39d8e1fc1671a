"""Float32 TFLite to int8 TFLite: integer input, output and arithmetic throughout, as NPUs need it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from sepdeploy.core.artifact import Format
from sepdeploy.core.quiet import quiet, silenced_native_stderr
from sepdeploy.errors import SepdeployError, ToolError, UsageError
from sepdeploy.quantize.calibration_images import checked_images
from sepdeploy.quantize.drop_activations import drop_redundant_activations
from sepdeploy.quantize.inspect_int8 import require_int8_convs

__all__ = ["quantize_tflite"]


def quantize_tflite(source: Path, destination: Path, images: Iterable[np.ndarray]) -> None:
    """Write the int8 version of the float32 TFLite file `source` to `destination`.

    Weights are int8, symmetric, one scale per output channel; activations are int8, asymmetric, one scale per tensor,
    over the full range that they take on `images`. The input and the outputs become int8. Activations that saturation
    implies are dropped. The same images give the same bytes; memory does not grow with their number.

    Args:
        source: Float32 TFLite file with one input and static shapes.
        destination: The file to write.
        images: Inputs as the file takes them, (1, H, W, C) float32 for a channels-last file; read once.

    Raises:
        UsageError: if there are no images, or they do not fit the file's input.
        ToolError: if ai-edge-quantizer is not installed, fails, or leaves every convolution in float.
        OSError: if `destination` cannot be written.
    """
    try:
        with quiet():
            import ai_edge_quantizer.quantizer  # noqa: F401
    except ImportError as error:
        raise ToolError(
            f"ai-edge-quantizer cannot be imported ({error}); "
            "run pip install 'sepdeploy[tflite]', or leave TFLite out with --formats onnx"
        ) from error
    try:
        data = _quantized(source, images)
    except (SepdeployError, OSError):
        raise
    except Exception as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ToolError(f"ai-edge-quantizer could not quantize {source}: {reason}") from error
    destination.write_bytes(data)
    require_int8_convs(destination, Format.TFLITE)


def _quantized(source: Path, images: Iterable[np.ndarray]) -> bytes:
    from ai_edge_quantizer import calibrator, quantizer, recipe, recipe_manager
    from ai_edge_quantizer.utils import qsv_utils

    signature, input_name, shape = _single_input(source)
    with quiet():
        static_int8 = recipe.static_wi8_ai8()
        recipes = recipe_manager.RecipeManager()
        recipes.load_quantization_recipe(static_int8)
    with quiet(), silenced_native_stderr():
        # Quantizer.calibrate() takes a moving average that clips the ranges and costs 10 to 25 dB.
        ranges = calibrator.Calibrator(str(source), num_threads=1, qsv_update_func=qsv_utils.min_max_update)
    for image in checked_images(images, shape):
        with quiet():
            ranges.calibrate({signature: [{input_name: image}]}, recipes)
    with quiet():
        result = quantizer.Quantizer(str(source), static_int8).quantize(
            ranges.get_model_qsvs(), enable_progress_report=False
        )
    return drop_redundant_activations(bytes(result.quantized_model))[0]


def _single_input(source: Path) -> tuple[str, str, tuple[int, ...]]:
    """Signature, name and shape of the only input of the file."""
    from ai_edge_litert.interpreter import Interpreter

    with silenced_native_stderr():
        interpreter = Interpreter(str(source))
        interpreter.allocate_tensors()
        signatures = interpreter.get_signature_list()
        details = interpreter.get_input_details()
    if len(signatures) != 1 or len(details) != 1:
        raise UsageError(
            f"{source} has {len(signatures)} signatures and {len(details)} inputs; only networks with one of each "
            "can be calibrated"
        )
    ((signature, ends),) = signatures.items()
    return signature, ends["inputs"][0], tuple(int(size) for size in details[0]["shape"])
