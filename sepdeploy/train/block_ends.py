"""Run a network up to the end of a block, and find the weights that decide what comes out there."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sepdeploy.analyze.blocks import Block
from sepdeploy.core.quiet import error_summary
from sepdeploy.errors import UnsupportedModelError
from sepdeploy.train.features import FeatureTap

__all__ = ["run_to", "untrainable", "weights_by_block"]


class _Stop(BaseException):
    """Ends a forward pass; no Exception, so that the user's own handlers let it through."""


def run_to(model: nn.Module, name: str, batch: Tensor) -> tuple[Tensor, ...]:
    """What the module `name` returns for `batch`, which is not changed; what follows is not computed.

    Raises:
        UnsupportedModelError: if the network fails, or does not call the module.
    """
    with FeatureTap(model, (name,)) as tap:
        handle = model.get_submodule(name).register_forward_hook(_stop)
        try:
            model(batch.clone())
        except _Stop:
            pass
        except Exception as error:  # user code: whatever it raises
            raise untrainable(error) from error
        finally:
            handle.remove()
        return tap.features


def weights_by_block(
    model: nn.Module, blocks: Sequence[Block], example: Tensor
) -> tuple[tuple[tuple[str, ...], ...], int]:
    """Which weights belong to which block, as gradients show it.

    Args:
        model: The network, in eval mode.
        blocks: In the order in which they run.
        example: One image as the network takes it.

    Returns:
        weights: For each block, the names of the parameters with requires_grad that its end depends on and no end
            before it does.
        activation_bytes: What the backward pass through the longest of the blocks' passes from the image on keeps.

    Raises:
        UnsupportedModelError: if the network fails, or gradients cannot be computed.
    """
    rest = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    constants = {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    owned, most = [], 0
    for block in blocks:
        kept: dict[int, int] = {}  # by address: several operators keep the same activation

        def keep(tensor: Tensor, kept: dict[int, int] = kept) -> Tensor:
            if tensor.data_ptr() not in constants:
                kept[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            ends = [end.sum() for end in run_to(model, block.name, example) if end.requires_grad]
        most = max(most, sum(kept.values()))
        names = list(rest) if ends else []
        try:
            gradients = torch.autograd.grad(ends, [rest[name] for name in names], allow_unused=True) if names else ()
        except Exception as error:
            raise untrainable(error) from error
        owned.append(tuple(name for name, value in zip(names, gradients, strict=True) if value is not None))
        rest = {name: weight for name, weight in rest.items() if name not in owned[-1]}
    return tuple(owned), most


def untrainable(error: Exception) -> UnsupportedModelError:
    """The sentence for a network that fails when gradients are wanted."""
    return UnsupportedModelError(f"the network cannot be trained: {error_summary(error)}")


def _stop(*_arguments: object) -> None:
    raise _Stop
