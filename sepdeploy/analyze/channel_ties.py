"""Which channels of a network must keep one scale, found by letting numbers run through it in the place of values.

Every channel that a layer makes gets a number: operators that move values move the numbers; a sum ties the numbers that
meet; whatever is not known to commute with a positive factor fixes the numbers that it reads. So a layer that is called
twice, shares its weight, feeds a residual sum or is read by three others is right without a case of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from sepdeploy.analyze.flow_graph import MOVING, WEIGHTED, attribute, operator

__all__ = ["ANY_SCALE", "FIXED_SCALE", "ChannelTies", "TiedWeight"]

ANY_SCALE, FIXED_SCALE = 0, 1
"""The numbers of zeros, which have any scale, and of channels that keep theirs."""

_HOMOGENEOUS = frozenset({"relu", "leaky_relu", "prelu", "neg", "abs"})
_BY_CHANNEL = frozenset(
    {"max_pool1d", "max_pool2d", "avg_pool1d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d",
     "adaptive_avg_pool1d", "mean", "amax", "upsample_nearest2d", "upsample_bilinear2d"}
)  # fmt: skip
_SUMS = frozenset({"add", "sub"})
_CLAMPS = frozenset({"hardtanh", "clamp", "clamp_max", "relu6", "hardswish", "hardsigmoid"})


class _Classes:
    """Union-find over channel numbers."""

    def __init__(self) -> None:
        self._parents = [ANY_SCALE, FIXED_SCALE]
        self.passed_activation: set[int] = set()
        self.clipped: set[int] = set()

    def new(self, count: int) -> Tensor:
        """So many new numbers."""
        first = len(self._parents)
        self._parents.extend(range(first, first + count))
        return torch.arange(first, first + count)

    def root(self, number: int) -> int:
        """The smallest number that stands for the class."""
        while self._parents[number] != number:
            self._parents[number] = self._parents[self._parents[number]]
            number = self._parents[number]
        return number

    def tie(self, first: int, second: int) -> None:
        """Let two numbers have the same scale."""
        if ANY_SCALE in (first, second):
            return
        low, high = sorted((self.root(first), self.root(second)))
        self._parents[high] = low

    def tie_all(self, a: Tensor, b: Tensor) -> None:
        """Let numbers at the same places, (...) each, have the same scale."""
        if torch.equal(a, b):
            return
        pairs = torch.unique(a.reshape(-1) * len(self._parents) + b.reshape(-1))
        for pair in pairs.tolist():
            self.tie(*divmod(pair, len(self._parents)))

    def fix(self, numbers: Tensor, *, is_clip: bool = False) -> None:
        """Let numbers keep their scale."""
        for number in torch.unique(numbers).tolist():
            if is_clip and number > FIXED_SCALE:
                self.clipped.add(number)
            self.tie(number, FIXED_SCALE)

    def roots(self, numbers: Tensor) -> Tensor:
        """The class of each number."""
        return torch.tensor([self.root(number) for number in numbers.tolist()])


@dataclass(slots=True)
class _Labelled:
    """A value of the example run with the number of the channel that each of its elements belongs to.

    Attributes:
        value: What the operator returned.
        numbers: The same shape, int64; None where it does not depend on the input.
    """

    value: Any
    numbers: Any = None


@dataclass(slots=True)
class TiedWeight:
    """One weight tensor with the numbers of its rows and columns.

    Attributes:
        name: Its name in the network.
        tensor: The parameter, (O, I / groups, ...).
        rows: Numbers of the channels that it makes, (O,).
        columns: Numbers of those that it reads, (I,).
        groups: Of the convolution; 1 for linear layers.
        biases: Parameters that are added to the rows.
    """

    name: str
    tensor: Tensor
    rows: Tensor
    columns: Tensor
    groups: int
    biases: list[Tensor]


class ChannelTies(Interpreter):
    """Follows channels through a network, from where they are made to where they are read.

    Args:
        graph: The network's graph (`capture_graph`).
        example: Input of a single image.

    Attributes:
        weights: By the parameter's id.
        channels: Node -> numbers of its channels, (C,), where all elements of a channel have the same.
    """

    def __init__(self, graph: GraphModule, example: Tensor) -> None:
        super().__init__(graph)
        self._network = graph
        self._classes = _Classes()
        self._bias_numbers: dict[int, Tensor] = {}
        self.weights: dict[int, TiedWeight] = {}
        self.channels: dict[Node, Tensor] = {}
        with torch.no_grad():
            self.run(_Labelled(example, torch.full(example.shape, FIXED_SCALE)), enable_io_processing=False)
        self._fix_parameters_with_other_readers()

    def run_node(self, n: Node) -> Any:
        """Run one operator on values and numbers."""
        with self._set_current_node(n):
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            if n.op == "placeholder":
                return super().placeholder(str(n.target), args, kwargs)
            if n.op == "get_attr":
                return _Labelled(attribute(self._network, n))
            if n.op == "output":
                self._fix(args)
                return args
            return self._called(n, args, kwargs)

    def roots(self, numbers: Tensor) -> Tensor:
        """Class of each channel number; 0 and 1 keep their scale."""
        return self._classes.roots(numbers)

    def passed_activation(self, root: int) -> bool:
        """Whether a nonlinear operator reads channels of the class."""
        return any(self._classes.root(number) == root for number in self._classes.passed_activation)

    def is_clipped(self, numbers: Tensor) -> bool:
        """Whether one of the channels runs into an upper bound."""
        return bool(self._classes.clipped & set(numbers.tolist()))

    def _called(self, node: Node, args: Any, kwargs: Any) -> Any:
        value = _plain(node.target)(*_values(args), **_values(kwargs))
        leaves = [leaf for leaf in _leaves((args, kwargs)) if isinstance(leaf, _Labelled) and leaf.numbers is not None]
        if not leaves:
            return _Labelled(value) if isinstance(value, Tensor) else value
        if not isinstance(value, Tensor | list | tuple):
            return value  # sizes
        numbers = self._numbers(node, args, kwargs, value)
        if numbers is None:
            self._fix(leaves, is_clip=operator(node) in _CLAMPS)
            numbers = _map_tensors(value, lambda tensor: torch.full(tensor.shape, FIXED_SCALE))
        if isinstance(value, Tensor):
            self._note_channels(node, numbers)
        return _Labelled(value, numbers)

    def _numbers(self, node: Node, args: Any, kwargs: Any, value: Any) -> Any:
        """Numbers of what a node returns; None if it is not known to commute with a factor."""
        name = operator(node)
        first = args[0] if args else None
        if name in MOVING:
            return self._moved(node, name, args, kwargs)
        if not isinstance(first, _Labelled) or not isinstance(value, Tensor):
            return None
        if name in WEIGHTED:
            return self._weighted(node, first, args, value)
        if first.numbers is None and name not in {"mul", *_SUMS}:
            return None
        if name in _HOMOGENEOUS:
            self._classes.passed_activation |= set(torch.unique(first.numbers).tolist())
            return first.numbers
        if name in _BY_CHANNEL:
            return self._pooled(first.numbers, value.shape)
        if name in _SUMS:
            return self._summed(first, args[1], value.shape)
        if name in ("mul", "div"):
            return self._scaled(name, first, args[1], value.shape)
        return None

    def _moved(self, node: Node, name: str, args: Any, kwargs: Any) -> Any:
        fill = args[-1] if name in ("constant_pad_nd", "pad") and len(args) > 2 else 0
        if fill not in (0, None, "constant"):
            return None  # ones would need the scale of the channel, and mirrored edges are not worth a case
        if name == "index" and any(leaf.numbers is not None for leaf in _leaves(args[1]) if leaf is not None):
            return None
        constants = [leaf for leaf in _leaves(args[0]) if isinstance(leaf, _Labelled) and leaf.numbers is None]
        if constants:  # values joined with constants: zeros have any scale, all others keep theirs
            for leaf in constants:
                leaf.numbers = torch.where(leaf.value == 0, ANY_SCALE, FIXED_SCALE)
        target = torch.reshape if name in ("view", "_unsafe_view") else node.target  # numbers have strides of their own
        return _plain(target)(*_numbers_of(args), **_numbers_of(kwargs))

    def _weighted(self, node: Node, first: _Labelled, args: Any, value: Tensor) -> Tensor | None:
        weight, bias = (attribute(self._network, each) for each in (*node.args[1:3], None)[:2])
        needs_bias = len(args) > 2 and args[2] is not None
        if weight is None or (needs_bias and bias is None) or first.numbers is None:
            return None
        is_linear = operator(node) == "linear"
        groups = 1 if is_linear or len(args) < 7 else int(args[6])
        axis = -1 if is_linear else value.dim() - weight.dim() + 1
        columns = self._channel_numbers(first.numbers, axis)
        known = self.weights.get(id(weight))
        if known is None:
            rows = self._classes.new(len(weight))
            known = TiedWeight(str(node.args[1].target), weight, rows, columns, groups, [])  # type: ignore[union-attr]
            self.weights[id(weight)] = known
        elif known.groups != groups or len(known.columns) != len(columns):
            return None
        else:
            self._classes.tie_all(known.columns, columns)
        if bias is not None and needs_bias:
            self._classes.tie_all(self._bias_numbers.setdefault(id(bias), known.rows), known.rows)
            if all(each is not bias for each in known.biases):
                known.biases.append(bias)
        shape = [1] * value.dim()
        shape[axis] = len(weight)
        return known.rows.reshape(shape).expand(value.shape)

    def _channel_numbers(self, numbers: Tensor, axis: int) -> Tensor:
        """One number for each channel, all elements of which are tied: a weight scales the channel as a whole."""
        rows = numbers.movedim(axis, 0).reshape(numbers.shape[axis], -1)
        largest = rows.amax(1)
        if not bool((rows == largest[:, None]).all()):
            self._classes.tie_all(rows, largest[:, None].expand_as(rows))
        return largest

    def _pooled(self, numbers: Tensor, shape: torch.Size) -> Tensor | None:
        """Of a reduction over positions; the second dimension counts channels."""
        if numbers.dim() < 3 or len(shape) < 2 or shape[1] != numbers.shape[1]:
            return None
        channels = self._channel_numbers(numbers, 1)
        return channels.reshape(1, -1, *[1] * (len(shape) - 2)).expand(shape)

    def _summed(self, first: _Labelled, other: Any, shape: torch.Size) -> Tensor | None:
        if not isinstance(other, _Labelled) or first.numbers is None or other.numbers is None:
            return None
        a, b = (each.numbers.expand(shape) for each in (first, other))
        self._classes.tie_all(a, b)
        return torch.where(a == ANY_SCALE, b, a)

    def _scaled(self, name: str, first: _Labelled, other: Any, shape: torch.Size) -> Tensor | None:
        """Of a product with what has no scale of its own: a number, a constant, a gate."""
        if not isinstance(other, _Labelled) or other.numbers is None:
            return None if first.numbers is None else first.numbers.expand(shape)
        one, two = first.numbers, other.numbers
        scaled: Tensor | None = None
        if one is None or (name == "mul" and self._is_fixed(one)):
            scaled = None if name == "div" else two
        elif self._is_fixed(two):
            scaled = one
        return None if scaled is None else scaled.expand(shape)

    def _is_fixed(self, numbers: Tensor) -> bool:
        return all(self._classes.root(number) == FIXED_SCALE for number in torch.unique(numbers).tolist())

    def _fix(self, values: Any, *, is_clip: bool = False) -> None:
        for leaf in _leaves(values):
            if isinstance(leaf, _Labelled) and leaf.numbers is not None:
                for numbers in _leaves(leaf.numbers):
                    self._classes.fix(numbers, is_clip=is_clip)

    def _note_channels(self, node: Node, numbers: Tensor) -> None:
        if numbers.dim() in (2, 4):
            rows = numbers.movedim(1, 0).reshape(numbers.shape[1], -1)
            if bool((rows == rows[:, :1]).all()):
                self.channels[node] = rows[:, 0].clone()

    def _fix_parameters_with_other_readers(self) -> None:
        """A weight or bias that anything else reads too must not change."""
        of_bias = {id(bias): weight for weight in self.weights.values() for bias in weight.biases}
        for node in self._network.graph.nodes:
            parameter = attribute(self._network, node)
            if parameter is None:
                continue
            weight, owner = self.weights.get(id(parameter)), of_bias.get(id(parameter))
            for reader in node.users:
                is_weight = operator(reader) in WEIGHTED and reader.args[1] is node
                is_bias = operator(reader) in WEIGHTED and len(reader.args) > 2 and reader.args[2] is node
                if weight is not None and not is_weight:
                    self._classes.fix(torch.cat([weight.rows, weight.columns]))
                if owner is not None and not is_bias:
                    self._classes.fix(owner.rows)


def _plain(target: Any) -> Callable[..., Any]:
    function: Callable[..., Any] = target
    return function


def _leaves(value: Any) -> list[Any]:
    """What is in nested tuples, lists and dictionaries."""
    if isinstance(value, dict):
        return [leaf for each in value.values() for leaf in _leaves(each)]
    if isinstance(value, list | tuple):
        return [leaf for each in value for leaf in _leaves(each)]
    return [value]


def _map(value: Any, change: Callable[[Any], Any]) -> Any:
    if isinstance(value, dict):
        return {key: _map(each, change) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_map(each, change) for each in value)
    return change(value)


def _values(value: Any) -> Any:
    return _map(value, lambda leaf: leaf.value if isinstance(leaf, _Labelled) else leaf)


def _numbers_of(value: Any) -> Any:
    """Numbers in the place of values that depend on the input; constants, such as indices, as they are."""

    def change(leaf: Any) -> Any:
        if not isinstance(leaf, _Labelled):
            return leaf
        return leaf.value if leaf.numbers is None else leaf.numbers

    return _map(value, change)


def _map_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    return _map(value, lambda leaf: change(leaf) if isinstance(leaf, Tensor) else leaf)
