"""Rescale channels so that int8 fits all of them, without changing the function.

A channel between two linear operators may be divided by s > 0 where it is made (a row of weights and its bias) if it is
multiplied by s wherever it is read (a column of weights). That holds through everything that commutes with a positive
factor: ReLU, LeakyReLU, PReLU, pooling, shuffles, slices, concatenations, sums. Between the factors of one separable
form this balances them; through activations it is the cross-layer equalisation of Nagel et al., "Data-Free Quantization
Through Weight Equalization and Bias Correction" (2019).

Which channels are tied together is not guessed from names or shapes: `analyze/channel_ties.py`.

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

from sepdeploy.analyze.channel_ties import ANY_SCALE, FIXED_SCALE, ChannelTies, TiedWeight
from sepdeploy.analyze.flow_graph import WEIGHTED, capture_graph, operator

__all__ = ["EqualizedLayer", "KeptScale", "equalize_channels"]

_SUMS = frozenset({"add", "sub"})

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
        scales[: FIXED_SCALE + 1] = 1.0
    spreads = {id(w.tensor): _spreads(roots[id(w.tensor)][0], tensors, scales) for w in weights}
    _apply(scales, weights, roots)
    return tuple(_described(w, weights, roots, ties, scales, spreads[id(w.tensor)]) for w in weights)


def _step(
    scales: Tensor, tensors: list[tuple[Tensor, Tensor]], weights: list[TiedWeight], roots: Mapping[int, Any]
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


def _column_shares(weight: TiedWeight, column_scales: Tensor) -> Tensor:
    """Largest |weight| of each input channel as a share of its row's largest, (I,)."""
    magnitudes = weight.tensor.detach().double().abs().flatten(2).amax(2) if weight.tensor.dim() > 2 else (
        weight.tensor.detach().double().abs()
    )  # fmt: skip
    groups, per_group = weight.groups, weight.tensor.shape[1]
    by_group = magnitudes.reshape(groups, -1, per_group) * column_scales.reshape(groups, 1, per_group)
    rows = by_group.amax(2, keepdim=True)
    return (by_group / rows.clamp_min(torch.finfo(torch.float64).tiny)).amax(1).reshape(-1)


def _apply(scales: Tensor, weights: list[TiedWeight], roots: Mapping[int, Any]) -> None:
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
    wanted = set(rows.tolist()) - {ANY_SCALE, FIXED_SCALE}
    for numbers, values in tensors:
        if wanted & set(numbers.tolist()):
            alive = values > 0
            if bool(alive.any()):
                before, after = values[alive], (values / scales[numbers])[alive]
                return tuple(float(each.max() / each.median()) for each in (before, after))  # type: ignore[return-value]
    return 1.0, 1.0


def _described(
    weight: TiedWeight,
    weights: list[TiedWeight],
    roots: Mapping[int, Any],
    ties: ChannelTies,
    scales: Tensor,
    spreads: tuple[float, float],
) -> EqualizedLayer:
    rows = roots[id(weight.tensor)][0]
    own = set(rows.tolist()) - {ANY_SCALE, FIXED_SCALE}
    readers = tuple(w.name for w in weights if own & set(roots[id(w.tensor)][1].tolist()))
    kept = None
    if bool((rows == FIXED_SCALE).any()):
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
