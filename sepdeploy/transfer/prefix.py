"""Run a network only up to one module and look at what goes in and comes out there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sepdeploy.core.quiet import error_summary
from sepdeploy.errors import UnsupportedModelError

__all__ = ["Seen", "as_images", "run_until", "stopping_at"]


@dataclass(frozen=True, slots=True)
class Seen:
    """Inputs and outputs of one module in one forward pass, one entry per call.

    Attributes:
        inputs: (N, I, H, W) each, also where the network calls the module on a single (I, H, W). For a linear layer
            each position is an image of one pixel, (N * positions, I, 1, 1).
        outputs: (N, O, H', W') each, likewise; empty if only inputs were asked for.
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
        batch: Input of the network; not changed, even by networks that work on it in place.
        calls: How often one forward pass calls the module.
        needs_outputs: Whether to run the module the last time too; else it stops at its input.

    Raises:
        UnsupportedModelError: if the network fails on the batch, or calls the module less often than that.
    """
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []

    module = model.get_submodule(name)

    def unreached() -> str:
        return (
            f"the network called {name} {len(inputs)} times in one forward pass, but {calls} times when it was traced"
        )

    with stopping_at(batch, unreached) as stop:
        # Copies: networks often go on in place on what a convolution reads or returns (relu_, +=).
        def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs.append(as_images(module, args[0] if args else kwargs["input"]).clone())
            if not needs_outputs and len(inputs) == calls:
                stop()

        def after(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> None:
            outputs.append(as_images(module, output).clone())
            if len(outputs) == calls:
                stop()

        handles = [module.register_forward_pre_hook(before, with_kwargs=True)]
        if needs_outputs:
            handles.append(module.register_forward_hook(after))
        try:
            model(batch.clone())
        finally:
            for handle in handles:
                handle.remove()
    return Seen(tuple(inputs[:calls]), tuple(outputs[:calls]))


@contextmanager
def stopping_at(batch: Tensor, unreached: Callable[[], str]) -> Iterator[Callable[[], None]]:
    """Run a network in this context; what is yielded ends its forward pass when a hook calls it.

    Args:
        batch: Input of the network, for the message when it fails.
        unreached: Says what the forward pass lacked if it ends by itself.

    Raises:
        UnsupportedModelError: if the network fails, or its forward pass ends by itself.
    """
    is_stopped = False

    def stop() -> None:
        nonlocal is_stopped
        is_stopped = True
        raise _Stop

    try:
        yield stop
    except _Stop:
        return
    except Exception as error:
        raise UnsupportedModelError(
            f"the network does not run on a batch of shape {tuple(batch.shape)}: {error_summary(error)}; its forward "
            "pass must work for any number of images"
        ) from error
    if not is_stopped:  # networks that swallow everything go on to their end
        raise UnsupportedModelError(f"{unreached()}; its forward pass must not depend on the values of the image")


def as_images(module: nn.Module, x: Tensor) -> Tensor:
    """(C, H, W) as (1, C, H, W), vectors (..., C) of a linear layer as (N, C, 1, 1); a batch as it is.

    Args:
        module: The layer whose input or output `x` is.
        x: The tensor.
    """
    if isinstance(module, nn.Linear):
        return x.reshape(-1, x.shape[-1], 1, 1)
    return x if x.dim() == 4 else x[None]
