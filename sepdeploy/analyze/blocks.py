"""Where a network can be cut in two: the blocks that can imitate another network's one by one.

One real run is observed below autograd, as in `trace.py`. A place in the order of its operators is a cut point if
exactly one activation that depends on the input is still needed there. It is of use if a module returned that
activation, so that the same place can be found in a network whose layers were replaced. Inside a residual block there
is none, between residual blocks there is one.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from torch.utils.weak import WeakTensorKeyDictionary

from sepdeploy.analyze.recorder import run_once, watching_modules
from sepdeploy.analyze.trace import output_tensors

__all__ = ["Block", "find_blocks"]


@dataclass(frozen=True, slots=True)
class Block:
    """A part of a network, from the end of the block before it to the output of one module.

    Attributes:
        name: Qualified name of the module whose output ends the block; '' is the network itself with all its outputs.
        layers: Names of the layers in it, in the order in which they first run.
    """

    name: str
    layers: tuple[str, ...]


@torch.no_grad()
def find_blocks(model: nn.Module, example: Tensor, layers: Collection[str]) -> tuple[Block, ...]:
    """Cut a network into the smallest blocks around `layers`.

    A block has at least one of the layers. It ends at the last cut point before the next multiplication by weights, so
    that norms, activations and poolings after a layer are in its block. Layers without a cut point between them share
    a block; the last block is the whole rest where nothing can be cut.

    Args:
        model: The network, in eval mode.
        example: One image as the network takes it, (1, C, H, W) or (1, H, W, C), float32.
        layers: Qualified names of modules. Those that the run never calls are in no block.

    Returns:
        Blocks in the order in which they run, named by the outermost modules that are called once and return that.

    Raises:
        UsageError: if the network does not run on an input of this shape.
        UnsupportedModelError: if it returns no tensor.

    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(32, 5))
    >>> find_blocks(model, torch.zeros(1, 3, 6, 6), ("0", "2"))
    (Block(name='1', layers=('0',)), Block(name='2', layers=('2',)))
    """
    image = example.clone()  # a copy: networks may normalize their input in place
    flow = _DataFlow(image)
    with watching_modules(flow.enter, flow.leave), flow:
        returned = run_once(model, image)
    sole_values = flow.sole_values(output_tensors(returned))
    names = _names_of_values(model, flow)
    cuts = [(place, names[value]) for place, value in enumerate(sole_values) if value in names]
    spans = {name: flow.spans[id(module)] for name in layers if id(module := model.get_submodule(name)) in flow.spans}
    return tuple(_group(spans, cuts, flow.products))


def _group(spans: dict[str, _Span], cuts: Sequence[tuple[int, str]], products: Sequence[int]) -> list[Block]:
    """Put each layer into a block that ends at one of the cuts, (place, name) in order."""
    blocks = []
    group: list[str] = []
    ordered = sorted(spans, key=lambda name: spans[name].first)
    for place, name in enumerate(ordered, 1):
        group.append(name)
        end = max(spans[member].last for member in group)
        limit = spans[ordered[place]].first if place < len(ordered) else math.inf
        usable = [cut for cut in cuts if end <= cut[0] <= limit]
        if usable:
            product = next((product for product in products if product >= usable[0][0]), math.inf)
            blocks.append(Block([cut[1] for cut in usable if cut[0] <= product][-1], tuple(group)))
            group = []
    return [*blocks, Block("", tuple(group))] if group else blocks


def _names_of_values(model: nn.Module, flow: _DataFlow) -> dict[int, str]:
    """Value -> the outermost module that returned it, of those that can serve as the end of a block."""
    names: dict[int, str] = {}
    by_depth = sorted(model.named_modules(), key=lambda item: len(item[0].split(".")) if item[0] else 0)
    for name, module in by_depth:
        if isinstance(module, _DropoutNd):
            continue  # it returns what it reads, but not while the network is trained
        if flow.calls[id(module)] == 1 and id(module) in flow.returned:
            names.setdefault(flow.returned[id(module)], name)
    return names


@dataclass(slots=True)
class _Span:
    """Operators before a module's first call, and when its last call is over."""

    first: int
    last: int


@dataclass(slots=True, eq=False)
class _Buffer:
    """What tensors that are views of each other share.

    Attributes:
        numel: Elements of the whole.
        value: Number of the activation that it holds now, None while it does not depend on the input. Writing in place
            makes a new one.
    """

    numel: int
    value: int | None = None


@dataclass(slots=True)
class _Operation:
    """An operator that depends on the input: numbers of the activations that it reads and writes."""

    reads: set[int]
    writes: list[int] = field(default_factory=list)


class _DataFlow(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records which operators that depend on `image` read what, and which module returned what.

    Attributes:
        products: Operators, by their place, that multiply matrices or convolve.
        calls: Calls per module, by id.
        spans: When modules ran, by id.
        returned: What modules returned last, by id, where that was a single tensor of real numbers.
    """

    def __init__(self, image: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.products: list[int] = []
        self.calls: Counter[int] = Counter()
        self.spans: dict[int, _Span] = {}
        self.returned: dict[int, int] = {}
        self._operations: list[_Operation] = []
        self._values = 1
        # Weak: watching must not keep activations alive.
        self._buffers = WeakTensorKeyDictionary({image: _Buffer(image.numel(), 0)})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if func.is_view:
            self._buffers.update(dict.fromkeys(outputs, self._buffer(args[0])))
            return result
        inputs = [self._value(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        operation = _Operation({value for value in inputs if value is not None})
        if operation.reads:
            if func._overloadpacket in flop_registry:
                self.products.append(len(self._operations))
            for output in outputs:
                self._buffer(output).value = self._values
                operation.writes.append(self._values)
                self._values += 1
            self._operations.append(operation)
        return result

    def enter(self, module: nn.Module) -> None:
        """A module starts to run."""
        self.calls[id(module)] += 1
        self.spans.setdefault(id(module), _Span(len(self._operations), len(self._operations)))

    def leave(self, module: nn.Module, output: object) -> None:
        """A module has returned `output`."""
        self.spans[id(module)].last = len(self._operations)
        if isinstance(output, Tensor) and output.is_floating_point():
            value = self._value(output)
            # A slice does not stand for the whole.
            if value is not None and output.numel() == self._buffer(output).numel:
                self.returned[id(module)] = value

    def sole_values(self, outputs: Sequence[Tensor]) -> list[int | None]:
        """For each place, operators done so far, the one activation that what follows needs; None if not just one."""
        end = len(self._operations)
        last_use = {value: end for output in outputs if (value := self._value(output)) is not None}
        written = {0: 0}
        for place, operation in reversed(list(enumerate(self._operations))):
            if any(value in last_use for value in operation.writes):  # else no output depends on it
                written.update(dict.fromkeys(operation.writes, place + 1))
                for value in operation.reads:
                    last_use.setdefault(value, place)
        # Numbers of activations alive, and the sum of their numbers, which is the number of the only one.
        counts, sums = [0] * (end + 2), [0] * (end + 2)
        for value, last in last_use.items():
            if value in written:
                for changes, amount in ((counts, 1), (sums, value)):
                    changes[written[value]] += amount
                    changes[last + 1] -= amount
        alive = list(zip(accumulate(counts), accumulate(sums), strict=True))[:-1]
        return [total if count == 1 else None for count, total in alive]

    def _buffer(self, tensor: Tensor) -> _Buffer:
        if tensor not in self._buffers:
            self._buffers[tensor] = _Buffer(tensor.numel())
        buffer: _Buffer = self._buffers[tensor]
        return buffer

    def _value(self, tensor: Tensor) -> int | None:
        return self._buffer(tensor).value if tensor in self._buffers else None
