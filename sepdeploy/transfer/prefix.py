"""Run a network only up to one module and look at what goes in and comes out there."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sepdeploy.errors import ContractError

__all__ = ["Seen", "run_until"]


@dataclass(frozen=True, slots=True)
class Seen:
    """Inputs and outputs of one module in one forward pass, one entry per call.

    Attributes:
        inputs: (N, I, H, W) each.
        outputs: (N, O, H', W') each; empty if only inputs were asked for.
    """

    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


class _Stop(BaseException):
    """Ends the forward pass; no Exception, so that the user's own handlers let it through."""


@torch.no_grad()
def run_until(model: nn.Module, name: str, batch: Tensor, *, calls: int, needs_outputs: bool) -> Seen:
    """Run `model` on `batch` until the module `name` has been called `calls` times; what follows is not computed.

    Args:
        model: The network, in eval mode.
        name: Qualified name of the module.
        batch: Input of the network.
        calls: How often one forward pass calls the module.
        needs_outputs: Whether to run the module the last time too; else it stops at its input.

    Raises:
        ContractError: if the module is called less often than that.
    """
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []

    def before(_module: nn.Module, args: tuple[Any, ...]) -> None:
        inputs.append(args[0])
        if not needs_outputs and len(inputs) == calls:
            raise _Stop

    def after(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> None:
        # A copy: networks often go on in place on a convolution's output (relu_, +=).
        outputs.append(output.clone())
        if len(outputs) == calls:
            raise _Stop

    module = model.get_submodule(name)
    handles = [module.register_forward_pre_hook(before)]
    if needs_outputs:
        handles.append(module.register_forward_hook(after))
    try:
        model(batch)
    except _Stop:
        return Seen(tuple(inputs), tuple(outputs))
    finally:
        for handle in handles:
            handle.remove()
    raise ContractError(f"{name} was called {len(inputs)} times in one forward pass, its trace has {calls} calls")
