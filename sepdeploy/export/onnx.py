"""PyTorch to ONNX: opset 18, static shapes, simplified, and the same bytes for the same weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sepdeploy.core.quiet import first_line, quiet
from sepdeploy.errors import ToolError, UnsupportedModelError
from sepdeploy.export.flat_outputs import FlatOutputs, evaluating, output_shapes, require_below_2_gib
from sepdeploy.export.refuse import refuse_export
from sepdeploy.export.rewrite_onnx import rewrite_for_int8

if TYPE_CHECKING:
    import onnx

__all__ = ["OPSET", "export_onnx"]

OPSET = 18
"""Version of the ONNX operator set: the oldest that the exporter targets directly, so the most runtimes read it."""


def export_onnx(model: nn.Module, example: Tensor, path: Path) -> None:
    """Write `model` to `path` as an ONNX file with static shapes.

    The input is named 'input'; a single output 'output', several 'output_0', 'output_1', ... in the order of the
    tensors in the network's outputs. The file is simplified, passes the full ONNX check and loads in onnxruntime. It
    carries no documentation strings, metadata or paths: the same weights give the same bytes.

    Args:
        model: The network, on the CPU; left as it was found.
        example: An input, (1, C, H, W) for images, that fixes the shapes of the file.
        path: The file to write.

    Raises:
        UnsupportedModelError: if the network cannot be exported or is too large for one file.
        ToolError: if the simplifier, the checker or onnxruntime rejects what the exporter made.
        OSError: if `path` cannot be written.
    """
    require_below_2_gib(model, "an ONNX")
    with evaluating(model):
        flat = FlatOutputs(model).eval()
        count = len(output_shapes(flat, example))
        names = ["output"] if count == 1 else [f"output_{i}" for i in range(count)]
        exported = _exported(flat, example, names)
    _require_static_outputs(exported)
    simplified = _simplified(exported)
    if rewrite_for_int8(simplified):
        simplified = _simplified(simplified)
    _strip_metadata(simplified)
    data = _checked_bytes(simplified)
    path.write_bytes(data)


def _exported(model: FlatOutputs, example: Tensor, output_names: list[str]) -> onnx.ModelProto:
    try:
        with quiet(), torch.no_grad():
            program = torch.onnx.export(
                model,
                (example,),
                dynamo=True,
                opset_version=OPSET,
                input_names=["input"],
                output_names=output_names,
                external_data=False,
                verbose=False,
            )
            if program is None:
                raise UnsupportedModelError("the ONNX exporter returned nothing for this network")
            return program.model_proto
    except UnsupportedModelError:
        raise
    except Exception as error:
        raise refuse_export(error, "ONNX", "tflite") from error


def _require_static_outputs(model: onnx.ModelProto) -> None:
    for output in model.graph.output:
        if any(not dim.HasField("dim_value") for dim in output.type.tensor_type.shape.dim):
            raise UnsupportedModelError(
                f"the shape of the network's output '{output.name}' depends on the values of its input; "
                "return tensors of a fixed shape and select from them outside of the network"
            )


def _simplified(model: onnx.ModelProto) -> onnx.ModelProto:
    with quiet() as printed:
        try:
            import onnxsim

            simplified, is_valid = onnxsim.simplify(model)
        except Exception as error:
            raise ToolError(
                f"onnxsim failed to simplify the exported network: {first_line(error)}", stderr=printed.getvalue()
            ) from error
    if not is_valid:
        raise ToolError("onnxsim made a network that fails its own check", stderr=printed.getvalue())
    result: onnx.ModelProto = simplified
    return result


def _strip_metadata(model: onnx.ModelProto) -> None:
    """Drop what the exporter notes for people: source lines, paths on this machine, names of its passes."""
    graph = model.graph
    for part in (model, graph, *graph.node, *graph.initializer, *graph.input, *graph.output, *graph.value_info):
        part.ClearField("doc_string")
        part.ClearField("metadata_props")


def _checked_bytes(model: onnx.ModelProto) -> bytes:
    """`model` as bytes that the full ONNX check accepts and that onnxruntime loads."""
    import onnx
    import onnxruntime

    data: bytes = model.SerializeToString(deterministic=True)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    try:
        onnx.checker.check_model(data, full_check=True)
        onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ToolError(f"the exported ONNX file is not valid: {first_line(error)}") from error
    return data
