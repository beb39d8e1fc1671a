"""Where a layer's output can be held against the original network's behind its nonlinearity and its shortcut.

Between a convolution and the next one lie operations that work element by element: batch norm, the addition of a
shortcut, an activation. Together they are a function z = phi(y) of the convolution's output y. What counts is mostly z:
errors that a ReLU cuts off do no harm, and an error that came in through the shortcut can be made up for (networks that
add before the norm read y elsewhere too; there it is an approximation). With phi in the original network and phi' in
the converted one (its shortcut differs), the wanted output is found by steps
    target = y' + (z - phi'(y')) / a,
with a the largest slope of phi per channel: on the convolution's own output it takes the shortcut's error off; on the
output y' that the layer has now it is the majorizing step for the squared error of z, which a least-squares solve then
follows (asymmetric and nonlinear reconstruction: Zhang, Zou, He and Sun, 2016, "Accelerating Very Deep Convolutional
Networks for Classification and Detection", sections 3.2 and 3.3, there by alternating over auxiliary variables).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sepdeploy.errors import UnsupportedModelError
from sepdeploy.transfer.prefix import as_images, stopping_at

__all__ = ["Anchor", "Anchored", "find_anchor", "run_to_anchor"]

_Place = tuple[str, bool, int, int]
"""Module, whether its output (or its input), which of its tensors, in which of its calls."""

_LEAST_SLOPE = 1e-3
"""Share of the largest slope below which a channel counts as one that hardly matters, not as one to be blown up."""

_PROBE_TOLERANCE = 1e-3
"""Relative difference of two probes of the Jacobian's diagonal; rounding through a norm and an addition is far less."""


@dataclass(frozen=True, slots=True)
class Anchor:
    """A place behind a layer up to which its output is only changed element by element.

    Attributes:
        place: The tensor there.
        slopes: (O,), float64: the largest derivative per channel, by absolute value; never 0.
        gains: (O,), float64: 1 where an error there says what the output should have been, 0 for channels that hardly
            reach it.
        is_affine: Whether the derivative was the same everywhere.
    """

    place: _Place
    slopes: Tensor
    gains: Tensor
    is_affine: bool


@dataclass(frozen=True, slots=True)
class Anchored:
    """One run of a network up to an anchor, all as (N, C, H, W); see `prefix.as_images`.

    Attributes:
        input: What the layer read.
        output: What it returned, or what was put in the place of that.
        result: The tensor at the anchor.
    """

    input: Tensor
    output: Tensor
    result: Tensor


@torch.no_grad()
def find_anchor(model: nn.Module, name: str, images: Tensor) -> Anchor | None:
    """The last place behind the module `name`, called once, up to which its output is changed element by element only.

    Found by running: tensors at the borders of modules are tried in their order, until one of them depends on an
    element of the output by way of others. Two random probes of the Jacobian tell: J v is v times J's diagonal for
    every v exactly if J is diagonal.

    Args:
        model: The original network in eval mode.
        name: An nn.Conv2d or nn.Linear.
        images: A few, as the network takes them.

    Returns:
        None if there is no such place, or the network cannot be differentiated.
    """
    module = model.get_submodule(name)
    generator = torch.Generator().manual_seed(0)
    leaves: list[Tensor] = []
    found = _Found()

    def replace(_input: Tensor, output: Tensor) -> Tensor:
        leaves.append(output.detach().clone().requires_grad_())
        torch.set_grad_enabled(True)  # from here on; what came before needs no graph
        return leaves[0].clone()  # networks may go on in place

    # A network that fails, or that cannot be differentiated (custom operators, detached tensors), has come as far as it
    # has; one that ends by itself is no less good.
    with suppress(UnsupportedModelError), stopping_at(images, lambda: "the end was reached") as stop:

        def watch(place: _Place, tensor: Tensor) -> None:
            if not leaves or not tensor.requires_grad:
                return
            weights = [torch.rand(tensor.shape, generator=generator).to(tensor) + 0.5 for _ in range(2)]
            first, second = (_gradient(tensor, weight, leaves[0]) for weight in weights)
            if first is None or second is None:
                return  # another branch
            if tensor.shape != leaves[0].shape:
                stop()
            diagonal = first.double() / weights[0]
            # All zero is no proof: the next layer's kernel may be.
            if not bool(diagonal.any()) or not _are_equal(diagonal, second.double() / weights[1]):
                stop()
            found.add(place, as_images(module, diagonal).transpose(0, 1).flatten(1))

        with _watching(model, name, replace, watch):
            model(images.clone())
    return found.anchor()


def run_to_anchor(
    model: nn.Module, name: str, batch: Tensor, anchor: Anchor, replace: Callable[[Tensor], Tensor] | None = None
) -> Anchored:
    """Run `model` up to the anchor; what follows is not computed.

    Args:
        model: In eval mode; has the modules of the network in which the anchor was found.
        name: The layer.
        batch: Input of the network; it stays as it is.
        anchor: Of that layer.
        replace: From the layer's input (N, I, H, W) to what is put in the place of its output (N, O, H', W').

    Raises:
        UnsupportedModelError: if the network does not run on the batch, or does not come to the anchor.
    """
    module = model.get_submodule(name)
    kept: dict[str, Tensor] = {}

    def replace_output(x: Tensor, output: Tensor) -> Tensor:
        kept["input"] = as_images(module, x).clone()
        own = as_images(module, output) if replace is None else replace(kept["input"])
        kept["output"] = own.clone()
        return own.reshape(output.shape).to(output.dtype).clone()

    unreached = (
        f"the network did not come from {name} to {anchor.place[0] or 'its output'} as when it was looked at first"
    )
    with stopping_at(batch, lambda: unreached) as stop:

        def watch(place: _Place, tensor: Tensor) -> None:
            if place == anchor.place and kept:
                kept["result"] = as_images(module, tensor).clone()
                stop()

        with torch.no_grad(), _watching(model, name, replace_output, watch, only=anchor.place[0]):
            model(batch.clone())
    return Anchored(kept["input"], kept["output"], kept["result"])


class _watching:  # noqa: N801  a context manager, named as what it does
    """Hooks that replace the output of one module and see the tensors that go into and come out of the others."""

    def __init__(
        self,
        model: nn.Module,
        name: str,
        replace: Callable[[Tensor, Tensor], Tensor],
        watch: Callable[[_Place, Tensor], None],
        only: str | None = None,
    ) -> None:
        self._model, self._name, self._replace, self._watch, self._only = model, name, replace, watch, only
        self._handles: list[Any] = []

    def __enter__(self) -> None:
        layer = self._model.get_submodule(self._name)
        inputs: list[Tensor] = []

        def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs[:] = [(args[0] if args else kwargs["input"]).clone()]

        def after(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> Tensor:
            return self._replace(inputs[0], output)

        self._handles += [
            layer.register_forward_pre_hook(before, with_kwargs=True),
            layer.register_forward_hook(after),
        ]
        for name, module in self._model.named_modules():
            if module is not layer and (self._only is None or name == self._only):
                self._follow(name, module)

    def _follow(self, name: str, module: nn.Module) -> None:
        calls = [0]

        def see(values: object, is_output: bool) -> None:
            for index, leaf in enumerate(tree_leaves(values)):
                if isinstance(leaf, Tensor):
                    self._watch((name, is_output, index, calls[0]), leaf)

        def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            see((args, kwargs), is_output=False)

        def after(_module: nn.Module, _args: tuple[Any, ...], output: object) -> None:
            see(output, is_output=True)
            calls[0] += 1

        self._handles += [
            module.register_forward_pre_hook(before, with_kwargs=True),
            module.register_forward_hook(after),
        ]

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()


def _gradient(result: Tensor, weights: Tensor, output: Tensor) -> Tensor | None:
    """The gradient of the weighted sum of `result`; None if it does not depend on `output`."""
    return torch.autograd.grad((result * weights).sum(), output, retain_graph=True, allow_unused=True)[0]


def _are_equal(first: Tensor, second: Tensor) -> bool:
    """Up to rounding through a norm, an addition and an activation."""
    tolerance = _PROBE_TOLERANCE * (first.abs() + 1e-2 * first.abs().max())
    return bool(((first - second).abs() <= tolerance).all())


class _Found:
    """The last place that passed, and the slopes up to it.

    A channel that an activation cut off on all images has the slope that it had before the activation.
    """

    def __init__(self) -> None:
        self._place: _Place | None = None
        self._slopes = torch.zeros(())
        self._diagonal = torch.zeros(())

    def add(self, place: _Place, diagonal: Tensor) -> None:
        """A further place with the diagonal of its Jacobian, (O, elements)."""
        here = diagonal.gather(1, diagonal.abs().argmax(1, keepdim=True))[:, 0]
        self._slopes = torch.where(here.abs() > _LEAST_SLOPE * here.abs().max(), here, self._slopes.to(here))
        self._place, self._diagonal = place, diagonal

    def anchor(self) -> Anchor | None:
        """The last place as an anchor; None if there was none."""
        largest = float(self._slopes.abs().max())
        if self._place is None or not 0 < largest < float("inf"):
            return None
        is_affine = bool(((self._diagonal - self._slopes[:, None]).abs() <= _PROBE_TOLERANCE * largest).all())
        floor = _LEAST_SLOPE * largest
        gains = (self._slopes.abs() > floor).double()
        slopes = torch.where(self._slopes < 0, -1.0, 1.0) * self._slopes.abs().clamp_min(floor)
        return Anchor(self._place, slopes, gains, is_affine)
