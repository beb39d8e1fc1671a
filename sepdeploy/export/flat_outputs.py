"""What both exporters need: a network in eval mode that returns a plain tuple of tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sepdeploy.core.quiet import first_line
from sepdeploy.errors import UnsupportedModelError

__all__ = ["FlatOutputs", "evaluating", "output_shapes", "require_below_2_gib"]

_MAX_WEIGHT_BYTES = 2**31 - 2**20  # protobuf and flatbuffers end at 2 GiB; 1 MiB is left for the graph itself


class FlatOutputs(nn.Module):
    """A network whose outputs are the tensors inside the outputs of `model`, in the order of PyTorch's pytrees.

    Dictionaries keep their insertion order; leaves that are not tensors (None, numbers, strings) are dropped.

    Raises:
        UnsupportedModelError: on the first call, if the outputs of `model` hold no tensor.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """The outputs of `model` for the input `x`."""
        outputs = self.model(x)
        tensors = tuple(leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor))
        if not tensors:
            raise UnsupportedModelError(
                f"the network returns {type(outputs).__name__} without a tensor inside; make its forward method return "
                "a tensor, or a tuple, list or dictionary of tensors"
            )
        return tensors


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put `model` into eval mode inside the block and every module back into its own mode after it."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def output_shapes(model: FlatOutputs, example: Tensor) -> tuple[tuple[int, ...], ...]:
    """Shapes of the outputs of `model`, which is in eval mode, for the input `example`.

    Raises:
        UnsupportedModelError: if the network cannot run on `example`.
    """
    try:
        with torch.no_grad():
            return tuple(tuple(output.shape) for output in model(example))
    except UnsupportedModelError:
        raise
    except Exception as error:
        raise UnsupportedModelError(
            f"the network does not run on an input of shape {tuple(example.shape)}: {first_line(error)}"
        ) from error


def require_below_2_gib(model: nn.Module, file_kind: str) -> None:
    """Refuse networks that a single file of `file_kind` ('an ONNX', 'a TFLite') cannot hold.

    Raises:
        UnsupportedModelError: if parameters and buffers take 2 GiB or more.
    """
    size_bytes = sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))
    if size_bytes > _MAX_WEIGHT_BYTES:
        raise UnsupportedModelError(
            f"the weights take {size_bytes / 2**30:.1f} GiB and {file_kind} file holds at most 2 GiB; "
            "use a smaller network"
        )
