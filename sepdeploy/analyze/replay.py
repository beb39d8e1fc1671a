"""Run a network again from one layer on, with another layer in that place.

What was computed before the layer is remembered module by module and returned instead of computed. No graph is
captured, so this works for every network that runs: what stands between the modules (additions, reshapes, control flow)
is run again as it is. `forward` itself is exchanged for the time of a run, on the objects: hooks of the user's own then
act as ever, calls past the hooks are seen too, and nothing stays on the network.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from sepdeploy.analyze.trace import output_tensors
from sepdeploy.core.quiet import error_summary
from sepdeploy.errors import UnsupportedModelError

__all__ = ["Replay"]

_Forward = Callable[..., Any]


class Replay:
    """One batch's run through a network up to a layer, to be continued with anything in the layer's place.

    Memory: the batch, and the outputs of the top-most modules that ended before the layer began.

    Args:
        model: The network in eval mode; it is left as it was.
        name: Qualified name of an nn.Conv2d or nn.Linear.
        batch: Input of the network; not changed, even by networks that work on it in place.
        shares_prefix: Whether to reuse what comes before the layer, as another batch has shown to be right; None finds
            out, by one more run.

    Attributes:
        outputs: The network's output tensors for the batch, in pytree order.
        shares_prefix: Whether what comes before the layer is reused. False where that does not give the network's own
            outputs, as with random numbers or hidden state: then every run is a complete one.

    Raises:
        UnsupportedModelError: if the network fails on the batch, or never calls the layer.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, name: str, batch: Tensor, *, shares_prefix: bool | None = None) -> None:
        self._model, self._layer, self._batch = model, model.get_submodule(name), batch
        self.outputs: list[Tensor] = []
        self._records: list[tuple[nn.Module, _Record]] = []
        self.shares_prefix = True
        self._record(name, needs_prefix=shares_prefix is not False)
        self.shares_prefix = self._is_exact() if shares_prefix is None else shares_prefix
        if not self.shares_prefix:
            self._records = []

    @torch.no_grad()
    def run(self, replacement: nn.Module) -> list[Tensor]:
        """The network's output tensors with another module in the layer's place, which takes what the layer takes."""
        # The layer itself must not run into its own exchange.
        layer = replacement.forward if replacement is self._layer else replacement
        queues: dict[nn.Module, deque[_Record]] = {}
        for module, record in self._records:
            queues.setdefault(module, deque()).append(record)

        def replayed(own: _Forward, queue: deque[_Record]) -> _Forward:
            return lambda *args, **kwargs: queue.popleft().play(args, kwargs) if queue else own(*args, **kwargs)

        exchanged = {module: replayed(module.forward, queue) for module, queue in queues.items()}
        with _forwards({**exchanged, self._layer: layer}):
            return output_tensors(self._model(self._batch.clone()))

    def _record(self, name: str, *, needs_prefix: bool) -> None:
        """Run the network as it is and remember what comes before the layer."""
        recorder = _Recorder()
        watched = (m for m in self._model.modules() if m not in (self._model, self._layer))
        wrapped = {module: recorder.watching(module) for module in watched} if needs_prefix else {}
        with _forwards({**wrapped, self._layer: recorder.arriving(self._layer)}):
            try:
                outputs = output_tensors(self._model(self._batch.clone()))
            except UnsupportedModelError:
                raise
            except Exception as error:  # user code raises whatever it likes
                raise UnsupportedModelError(
                    f"the network does not run on a batch of shape {tuple(self._batch.shape)}: {error_summary(error)}; "
                    "its forward pass must work for any number of images"
                ) from error
        if not recorder.has_arrived:
            raise UnsupportedModelError(
                f"the network never called {name}; its forward pass must not depend on the values of the image"
            )
        self.outputs = [output.clone() for output in outputs]
        self._records = recorder.records

    def _is_exact(self) -> bool:
        """Whether the layer itself in its place gives the network's own outputs."""
        try:
            outputs = self.run(self._layer)
        except Exception:  # whatever the network does not bear: complete runs are what it was made for
            return False
        return len(outputs) == len(self.outputs) and all(map(_is_close, outputs, self.outputs))


@dataclass(frozen=True, slots=True)
class _Argument:
    """In the place of an output that is one of the arguments: the same object, so that it can be changed in place."""

    index: int


@dataclass(frozen=True, slots=True)
class _Record:
    """What one call did.

    Attributes:
        output: What it returned, tensors as copies.
        changed: Arguments that it changed in place, by their place among the leaves of the call, and what they became.
    """

    output: Any
    changed: tuple[tuple[int, Tensor], ...]

    def play(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Do it again: tensors are handed out as copies, since networks go on in place."""
        leaves = tree_leaves((args, kwargs))
        for index, value in self.changed:
            leaves[index].copy_(value)

        def restored(leaf: object) -> object:
            if isinstance(leaf, _Argument):
                return leaves[leaf.index]
            return leaf.clone() if isinstance(leaf, Tensor) else leaf

        return tree_map(restored, self.output)


class _Recorder:
    """Collects the calls of modules that end before the layer begins; of calls within calls the outermost."""

    def __init__(self) -> None:
        self.has_arrived = False
        self._open: list[list[tuple[nn.Module, _Record]]] = [[]]  # per running module what ended within it

    @property
    def records(self) -> list[tuple[nn.Module, _Record]]:
        """Module and call, in the order of the calls."""
        return self._open[0]

    def arriving(self, layer: nn.Module) -> _Forward:
        """The layer's forward, which ends the recording."""
        own = layer.forward

        @functools.wraps(own)
        def forward(*args: Any, **kwargs: Any) -> Any:
            self.has_arrived = True
            return own(*args, **kwargs)

        return forward

    def watching(self, module: nn.Module) -> _Forward:
        """A module's forward, recorded until the layer begins."""
        own = module.forward

        @functools.wraps(own)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if self.has_arrived:
                return own(*args, **kwargs)
            leaves = tree_leaves((args, kwargs))
            versions = [_version(leaf) for leaf in leaves]
            self._open.append([])
            record = None
            try:
                output = own(*args, **kwargs)
                if not self.has_arrived:
                    record = _recorded(output, leaves, versions)
            finally:
                # A module that failed, or began the layer, will run again: what ended within it is what counts.
                within = self._open.pop()
                self._open[-1].extend(within if record is None else [(module, record)])
            return output

        return forward


def _recorded(output: object, arguments: list[Any], versions: list[int]) -> _Record | None:
    """A call as a record; None if it returned something that cannot be copied."""
    places = {id(leaf): index for index, leaf in enumerate(arguments) if isinstance(leaf, Tensor)}
    if not all(isinstance(leaf, Tensor | bool | int | float | complex | str | None) for leaf in tree_leaves(output)):
        return None

    def kept(leaf: object) -> object:
        if id(leaf) in places:
            return _Argument(places[id(leaf)])
        return leaf.detach().clone() if isinstance(leaf, Tensor) else leaf

    changed = tuple(
        (index, leaf.detach().clone())
        for index, (leaf, version) in enumerate(zip(arguments, versions, strict=True))
        if _version(leaf) != version
    )
    return _Record(tree_map(kept, output), changed)


def _version(leaf: object) -> int:
    """Counts the changes of a tensor in place; 0 for what has no such count."""
    return leaf._version if isinstance(leaf, Tensor) and not leaf.is_inference() else 0


@contextmanager
def _forwards(exchanged: Mapping[nn.Module, _Forward]) -> Iterator[None]:
    """Let modules run other functions as their forward."""
    own: dict[nn.Module, Any] = {module: vars(module).get("forward") for module in exchanged}
    try:
        for module, forward in exchanged.items():
            vars(module)["forward"] = forward
        yield
    finally:
        for module, forward in own.items():
            if forward is None:
                del vars(module)["forward"]
            else:
                vars(module)["forward"] = forward


def _is_close(output: Tensor, expected: Tensor) -> bool:
    """Equal up to the rounding of another memory layout."""
    if output.shape != expected.shape or output.dtype != expected.dtype:
        return False
    if not expected.is_floating_point() or not expected.numel():
        return torch.equal(output, expected)
    scale = float(expected.nan_to_num(0, 0, 0).abs().max())
    return torch.allclose(output, expected, rtol=1e-4, atol=1e-5 * scale, equal_nan=True)
