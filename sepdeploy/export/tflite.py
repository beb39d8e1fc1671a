"""PyTorch to TFLite in float32, through litert-torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sepdeploy.core.quiet import first_line, quiet, silenced_native_stderr
from sepdeploy.errors import ToolError, UsageError
from sepdeploy.export.flat_outputs import FlatOutputs, evaluating, output_shapes, require_below_2_gib
from sepdeploy.export.refuse import refuse_export
from sepdeploy.export.tflite_forms import TfliteForms

if TYPE_CHECKING:
    import litert_torch

__all__ = ["export_tflite"]


def export_tflite(model: nn.Module, example: Tensor, path: Path, *, is_channels_last: bool) -> None:
    """Write `model` to `path` as a float32 TFLite file with static shapes.

    The outputs are named 'output_0', 'output_1', ... in the order of the tensors in the network's outputs. The same
    weights give the same bytes.

    Args:
        model: The network, on the CPU; left as it was found.
        example: An input in the layout that `model` takes, (1, C, H, W) for images; it fixes the shapes of the file.
        path: The file to write.
        is_channels_last: Whether the file takes (1, H, W, C) and returns its 4-D outputs that way, as TFLite runtimes
            and NPUs expect of a network that takes (1, C, H, W) in PyTorch. False leaves the layout alone.

    Raises:
        UnsupportedModelError: if the network cannot be exported or is too large for one file.
        UsageError: if `is_channels_last` is asked for an input that is not 4-D.
        ToolError: if litert-torch is not installed.
        OSError: if `path` cannot be written.
    """
    if is_channels_last and example.dim() != 4:
        raise UsageError(f"a channels-last export needs a 4-D input (N, C, H, W), got shape {tuple(example.shape)}")
    require_below_2_gib(model, "a TFLite")
    with evaluating(model):
        flat = FlatOutputs(model).eval()
        shapes = output_shapes(flat, example)
        outputs_4d = [i for i, shape in enumerate(shapes) if len(shape) == 4]
        converted = _converted(flat, example, outputs_4d, is_channels_last=is_channels_last)
    with quiet(), silenced_native_stderr():
        converted.export(str(path))


class _Contiguous(nn.Module):
    """Runs a network on a contiguous copy of its input.

    `to_channel_last_io` hands the network a permuted view; its strides run on through the convolutions, and networks
    that flatten with `view` then fail to export. The copy itself leaves no operator in the file.
    """

    def __init__(self, model: FlatOutputs) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        outputs: tuple[Tensor, ...] = self.model(x.contiguous())
        return outputs


@contextmanager
def _whole_names() -> Iterator[None]:
    """Inside, litert-torch names tensors by modules as 'package.Class#module.name'.

    By itself it names them by the last part of each name: of modules in a list that is a number, the same in all lists.
    """
    try:
        from litert_torch.backend.debuginfo import _build

        original = _build._get_hierarchy
    except (ImportError, AttributeError):  # another version of it: then layers of the file are known by their place
        yield
        return
    _build._get_hierarchy = _module_of
    try:
        yield
    finally:
        _build._get_hierarchy = original


def _module_of(node: torch.fx.Node) -> str:
    """The innermost module that a node was made in."""
    stack: dict[str, tuple[str, str | type]] = node.meta.get("nn_module_stack", {})
    *_, (name, kind) = ("", ""), *stack.values()
    return f"{kind if isinstance(kind, str) else f'{kind.__module__}.{kind.__qualname__}'}#{name};"


def _converted(
    model: FlatOutputs, example: Tensor, outputs_4d: list[int], *, is_channels_last: bool
) -> litert_torch.model.Model:
    with quiet() as printed:
        try:
            with silenced_native_stderr():
                import litert_torch
        except ImportError as error:
            raise ToolError(
                f"litert-torch cannot be imported ({first_line(error)}); "
                "run pip install 'sepdeploy[tflite]', or leave TFLite out with --formats onnx",
                stderr=printed.getvalue(),
            ) from error
        module: nn.Module = model
        if is_channels_last:
            module = litert_torch.to_channel_last_io(_Contiguous(model), args=[0], outputs=outputs_4d).eval()
            example = example.permute(0, 2, 3, 1).contiguous()
        try:
            with torch.no_grad(), silenced_native_stderr(), _whole_names(), TfliteForms():
                return litert_torch.convert(module, (example,))
        except Exception as error:
            raise refuse_export(error, "TFLite", "onnx") from error
