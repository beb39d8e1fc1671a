"""Rescale channels so that int8 fits all of them, without changing the function.

A channel between two linear operators may be divided by s > 0 where it is made (a row of weights and its bias) if it is
multiplied by s wherever it is read (a column of weights). That holds through everything that commutes with a positive
factor: ReLU, LeakyReLU, PReLU, pooling, shuffles, slices, concatenations, sums. Between the factors of one separable
form this balances them; through activations it is the cross-layer equalisation of Nagel et al., "Data-Free Quantization
Through Weight Equalization and Bias Correction" (2019).

Which channels are tied together is not guessed from names or shapes. Every channel that a layer makes gets a number,
and the numbers run through the network in the place of values: operators that move values move the numbers; a sum ties
the numbers that meet; whatever is not known to commute with a factor fixes the numbers that it reads. So a layer that
is called twice, shares its weight, feeds a residual sum or is read by three others is right without a case of its own.

ReLU6 (and every other clamp from above) does not commute with a factor: min(x / s, 6) is another function, and a bound
per channel would cost the files an operator that nothing fuses. Channels that run into one keep their scale.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from sepdeploy.analyze.flow_graph import MOVING, WEIGHTED, attribute, capture_graph, operator

__all__ = ["ChannelTies", "EqualizedLayer", "KeptScale", "equalize_channels", "find_ties"]

_ANY, _FIXED = 0, 1
"""The numbers of zeros, which have any scale, and of channels that keep theirs."""

_HOMOGENEOUS = frozenset({"relu", "leaky_relu", "prelu", "neg", "abs"})
_BY_CHANNEL = frozenset(
    {"max_pool1d", "max_pool2d", "avg_pool1d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d",
     "adaptive_avg_pool1d", "mean", "amax", "upsample_nearest2d", "upsample_bilinear2d"}
)  # fmt: skip
_SUMS = frozenset({"add", "sub"})
_CLAMPS = frozenset({"hardtanh", "clamp", "clamp_max", "relu6", "hardswish", "hardsigmoid"})

_LARGEST_SCALE = 2.0**10
"""No channel is scaled by more, up or down: beyond it, rounding of biases would matter."""

_SWEEPS = 4


class KeptScale(Enum):
    """Why channels keep their scale; the value is the sentence that the user reads."""

    CLIPPED = "an activation with an upper bound (ReLU6, hard swish) follows, and a factor would move its bound"
    READ_BY_OTHERS = "something else than weights reads it, or it is an output of the network"


@dataclass(frozen=True, slots=True)
class EqualizedLayer:
    """What happened to the channels that one layer makes.

    Attributes:
        name: The layer's weight.
        channels: Its channels.
        scaled: How many of them were scaled.
        readers: Weights that are multiplied by the factors.
        is_linear: Whether no activation stands between: the layers are factors of one linear map.
        spread_before: Largest range of a channel over the median one, on the calibration images.
        spread_after: The same afterwards.
        kept: Why the others keep their scale; None where none does.
    """

    name: str
    channels: int
    scaled: int
    readers: tuple[str, ...]
    is_linear: bool
    spread_before: float
    spread_after: float
    kept: KeptScale | None


class _Classes:
    """Union-find over channel numbers."""

    def __init__(self) -> None:
        self._parents = [_ANY, _FIXED]
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
        if _ANY in (first, second):
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
            if is_clip and number > _FIXED:
                self.clipped.add(number)
            self.tie(number, _FIXED)

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
class _Weight:
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
        self.weights: dict[int, _Weight] = {}
        self.channels: dict[Node, Tensor] = {}
        with torch.no_grad():
            self.run(_Labelled(example, torch.full(example.shape, _FIXED)), enable_io_processing=False)
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
            numbers = _map_tensors(value, lambda tensor: torch.full(tensor.shape, _FIXED))
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
                leaf.numbers = torch.where(leaf.value == 0, _ANY, _FIXED)
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
            known = _Weight(str(node.args[1].target), weight, rows, columns, groups, [])  # type: ignore[union-attr]
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
        return torch.where(a == _ANY, b, a)

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
        return all(self._classes.root(number) == _FIXED for number in torch.unique(numbers).tolist())

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


def find_ties(network: nn.Module, example: Tensor) -> ChannelTies:
    """Follow the channels of a network in eval mode, given one image, (1, ...)."""
    return ChannelTies(capture_graph(network, example), example[:1])


@torch.no_grad()
def equalize_channels(
    network: nn.Module, example: Tensor, batches: Callable[[], Iterable[Tensor]]
) -> tuple[EqualizedLayer, ...]:
    """Rescale channels in place, so that per-tensor int8 activations and the weights that read them lose least.

    A channel whose range is a share a of its tensor's and whose largest weight is a share w of its rows' gets the
    factor sqrt(a / w): half of the imbalance stays with the activation, half goes to the weights. Where only depthwise
    convolutions read it, whose rows have scales of their own, it gets all of a.

    Args:
        network: In eval mode, its batch norms folded; its function stays the same up to rounding.
        example: One image, (1, ...).
        batches: Starts a pass over calibration images.

    Returns:
        One entry per layer with a channel between two weights, scaled or not.

    Raises:
        UnsupportedModelError: if the data flow cannot be captured.
    """
    graph = capture_graph(network, example)
    ties = ChannelTies(graph, example[:1])
    ranges = _channel_ranges(graph, ties, batches())
    tensors = [(ties.roots(ties.channels[node]), values) for node, values in ranges.items()]
    weights = list(ties.weights.values())
    roots = {id(w.tensor): (ties.roots(w.rows), ties.roots(w.columns)) for w in weights}
    size = 2 + max((int(part.max()) for pair in roots.values() for part in pair), default=0)
    scales = torch.ones(size, dtype=torch.float64)
    read = torch.zeros(size, dtype=torch.bool)
    for _, columns in roots.values():
        read[columns] = True
    for _ in range(_SWEEPS):
        scales *= _step(scales, tensors, weights, roots)
        scales.clamp_(1 / _LARGEST_SCALE, _LARGEST_SCALE)
        scales[~read] = 1.0
        scales[: _FIXED + 1] = 1.0
    spreads = {id(w.tensor): _spreads(roots[id(w.tensor)][0], tensors, scales) for w in weights}
    _apply(scales, weights, roots)
    return tuple(_described(w, weights, roots, ties, scales, spreads[id(w.tensor)]) for w in weights)


def _step(
    scales: Tensor, tensors: list[tuple[Tensor, Tensor]], weights: list[_Weight], roots: Mapping[int, Any]
) -> Tensor:
    """Factors on the present scales that even out ranges as they are with them."""
    activation = torch.zeros_like(scales)
    for numbers, values in tensors:
        present = values / scales[numbers]
        share = present / present.max().clamp_min(torch.finfo(torch.float64).tiny)
        activation.scatter_reduce_(0, numbers, share, "amax")
    weight_share = torch.zeros_like(scales)
    for weight in weights:
        if weight.tensor.shape[1] == 1:
            continue  # a row with one column has its own scale, whatever the column's
        columns = roots[id(weight.tensor)][1]
        share = _column_shares(weight, scales[columns])
        weight_share.scatter_reduce_(0, columns, share, "amax")
    both = (activation > 0) & (weight_share > 0)
    factors = torch.ones_like(scales)
    factors[both] = (activation[both] / weight_share[both]).sqrt()
    alone = (activation > 0) & (weight_share == 0)
    factors[alone] = activation[alone]
    return factors


def _column_shares(weight: _Weight, column_scales: Tensor) -> Tensor:
    """Largest |weight| of each input channel as a share of its row's largest, (I,)."""
    magnitudes = weight.tensor.detach().double().abs().flatten(2).amax(2) if weight.tensor.dim() > 2 else (
        weight.tensor.detach().double().abs()
    )  # fmt: skip
    groups, per_group = weight.groups, weight.tensor.shape[1]
    by_group = magnitudes.reshape(groups, -1, per_group) * column_scales.reshape(groups, 1, per_group)
    rows = by_group.amax(2, keepdim=True)
    return (by_group / rows.clamp_min(torch.finfo(torch.float64).tiny)).amax(1).reshape(-1)


def _apply(scales: Tensor, weights: list[_Weight], roots: Mapping[int, Any]) -> None:
    done: set[int] = set()
    for weight in weights:
        rows, columns = roots[id(weight.tensor)]
        tensor, groups = weight.tensor, weight.groups
        row_scales = scales[rows].reshape(-1, *[1] * (tensor.dim() - 1))
        column_scales = scales[columns].reshape(groups, 1, -1).expand(groups, len(tensor) // groups, -1)
        column_scales = column_scales.reshape(len(tensor), -1, *[1] * (tensor.dim() - 2))
        tensor.copy_(tensor.double() * column_scales / row_scales)
        for bias in weight.biases:
            if id(bias) not in done:
                bias.copy_(bias.double() / scales[rows])
                done.add(id(bias))


def _channel_ranges(graph: GraphModule, ties: ChannelTies, batches: Iterable[Tensor]) -> dict[Node, Tensor]:
    """Largest |value| per channel, (C,) float64, of what makes or reads scalable channels."""
    nodes = set()
    for node in graph.graph.nodes:
        if operator(node) in WEIGHTED | _SUMS:
            nodes |= {each for each in (*node.all_input_nodes, node) if each in ties.channels}
    # A convolution that only an activation reads is fused with it: its own values are never quantized.
    nodes -= {node for node in nodes if {operator(each) for each in node.users} == {"relu"}}
    observer = _RangeObserver(graph, nodes)
    for batch in batches:
        observer.run(batch)
    return observer.largest


class _RangeObserver(Interpreter):
    """Keeps the largest magnitude of each channel of some nodes."""

    def __init__(self, graph: GraphModule, nodes: set[Node]) -> None:
        super().__init__(graph)
        self._nodes = nodes
        self.largest: dict[Node, Tensor] = {}

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if n in self._nodes:
            values = result.detach().abs().movedim(1, 0).reshape(result.shape[1], -1).amax(1).double()
            self.largest[n] = torch.maximum(self.largest[n], values) if n in self.largest else values
        return result


def _spreads(rows: Tensor, tensors: list[tuple[Tensor, Tensor]], scales: Tensor) -> tuple[float, float]:
    """Largest over median channel range where the layer's channels are seen, before and after scaling."""
    wanted = set(rows.tolist()) - {_ANY, _FIXED}
    for numbers, values in tensors:
        if wanted & set(numbers.tolist()):
            alive = values > 0
            if bool(alive.any()):
                before, after = values[alive], (values / scales[numbers])[alive]
                return tuple(float(each.max() / each.median()) for each in (before, after))  # type: ignore[return-value]
    return 1.0, 1.0


def _described(
    weight: _Weight,
    weights: list[_Weight],
    roots: Mapping[int, Any],
    ties: ChannelTies,
    scales: Tensor,
    spreads: tuple[float, float],
) -> EqualizedLayer:
    rows = roots[id(weight.tensor)][0]
    own = set(rows.tolist()) - {_ANY, _FIXED}
    readers = tuple(w.name for w in weights if own & set(roots[id(w.tensor)][1].tolist()))
    kept = None
    if bool((rows == _FIXED).any()):
        kept = KeptScale.CLIPPED if ties.is_clipped(weight.rows) else KeptScale.READ_BY_OTHERS
    return EqualizedLayer(
        name=weight.name,
        channels=len(rows),
        scaled=int((scales[rows] != 1).sum()),
        readers=readers,
        is_linear=not any(ties.passed_activation(root) for root in own),
        spread_before=spreads[0],
        spread_after=spreads[1],
        kept=kept,
    )


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
