"""AdaRound: weights are rounded up or down so that outputs, not weights, come nearest.

Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization" (2020), layer by layer, without labels. All
layers learn side by side: each step draws some images, runs them once through the float network and once through the
int8 network as it is rounded so far, and takes for every layer its own inputs from the one and its targets from the
other. Nothing is stored between steps.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from sepdeploy.analyze.flow_graph import WEIGHTED, attribute, capture_graph, operator
from sepdeploy.core.int8 import Affine
from sepdeploy.quantize.simulate import fake_quantized, weight_scales

__all__ = ["round_adaptively"]

_STEPS = 400
_LEARNING_RATE = 0.1
_REGULARIZATION = 0.3
"""Weight of the pull towards 0 and 1 beside errors that are 1 when every weight is rounded to the nearer side."""

_WARMUP_RATIO = 0.2
_BETA = (20.0, 2.0)
"""Exponent of the term that pulls towards 0 or 1, from the end of the warm-up to the last step."""


@dataclass(slots=True)
class _Rounding:
    """How the weight of one layer is rounded.

    Attributes:
        weight: The parameter.
        scale: Of each row, (O, 1, ...).
        floor: Codes rounded down.
        logits: What is learned: the sigmoid, stretched, is how much of the next code is taken.
    """

    weight: Tensor
    scale: Tensor
    floor: Tensor
    logits: Tensor

    def share(self) -> Tensor:
        """Of the next code, in [0, 1]."""
        return (torch.sigmoid(self.logits) * 1.2 - 0.1).clamp(0, 1)

    def soft(self) -> Tensor:
        """The weight as it is while it learns."""
        return (self.floor + self.share()) * self.scale

    def hard(self) -> Tensor:
        """The weight on the grid; the largest of each row stays, and so does the scale."""
        return (self.floor + (self.share() >= 0.5)).clamp(-127, 127) * self.scale


def round_adaptively(
    network: nn.Module, example: Tensor, affines: Mapping[str, Affine], batches: Callable[[], Iterable[Tensor]]
) -> str:
    """Put the weights of a network on their int8 grids, in place, each on the better side.

    Returns:
        What was done, for the user; empty if there is no weight to round.
    """
    graph = capture_graph(network, example)
    roundings = _roundings(graph)
    if not roundings:
        return ""
    simulated = fake_quantized(graph, affines)
    originals = {key: rounding.weight.detach().clone() for key, rounding in roundings.items()}
    with torch.enable_grad():
        optimizer = torch.optim.Adam([r.logits.requires_grad_() for r in roundings.values()], lr=_LEARNING_RATE)
        errors = _Losses(simulated, roundings)
        for step, batch in enumerate(itertools.islice(_repeated(batches), _STEPS)):
            targets = _Targets(graph, roundings).see(batch, originals)
            losses = errors.see(batch, targets)
            loss = torch.stack(losses).sum() + _pull(roundings.values(), step)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    moved = total = 0
    with torch.no_grad():
        for key, rounding in roundings.items():
            hard = rounding.hard()
            nearest = torch.round(originals[key] / rounding.scale)
            moved += int((torch.round(hard / rounding.scale) != nearest).sum())
            total += hard.numel()
            rounding.weight.copy_(hard)
    return f"{len(roundings)} weights, {100 * moved / total:.1f}% of their values to the farther side"


def _roundings(graph: GraphModule) -> dict[int, _Rounding]:
    """By the parameter's id."""
    found = {}
    for node in graph.graph.nodes:
        weight = attribute(graph, node.args[1]) if operator(node) in WEIGHTED else None
        if weight is None or id(weight) in found:
            continue
        scale = weight_scales(weight).reshape(-1, *[1] * (weight.dim() - 1))
        codes = weight.detach() / scale
        floor = torch.floor(codes)
        share = ((codes - floor + 0.1) / 1.2).clamp(0.02, 0.98)
        logits = torch.log(share / (1 - share))
        # What has a code already keeps it: the largest of each row, on which the scale rests, above all.
        is_whole = (codes - torch.round(codes)).abs() < 1e-4
        floor = torch.where(is_whole, torch.round(codes), floor)
        logits = torch.where(is_whole, torch.full_like(logits, -30.0), logits)
        found[id(weight)] = _Rounding(weight, scale, floor, logits)
    return found


def _pull(roundings: Iterable[_Rounding], step: int) -> Tensor:
    """Pulls shares to 0 or 1, more and more."""
    progress = (step / _STEPS - _WARMUP_RATIO) / (1 - _WARMUP_RATIO)
    if progress < 0:
        return torch.zeros(())
    beta = _BETA[1] + (_BETA[0] - _BETA[1]) * (1 - progress)
    terms = [(1 - (2 * r.share() - 1).abs().pow(beta)).mean() for r in roundings]
    return _REGULARIZATION * torch.stack(terms).sum()


def _repeated(batches: Callable[[], Iterable[Tensor]]) -> Iterator[Tensor]:
    while True:
        yield from batches()


class _Targets(Interpreter):
    """Outputs of the float network's layers, in the order of their calls."""

    def __init__(self, graph: GraphModule, roundings: Mapping[int, _Rounding]) -> None:
        super().__init__(graph)
        self._graph, self._roundings = graph, roundings
        self._outputs: list[Tensor] = []

    @torch.no_grad()
    def see(self, batch: Tensor, originals: Mapping[int, Tensor]) -> list[Tensor]:
        """Run a batch with the weights as they were."""
        for key, original in originals.items():
            self._roundings[key].weight.copy_(original)
        self.run(batch)
        return self._outputs

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        if operator(n) in WEIGHTED and id(attribute(self._graph, n.args[1])) in self._roundings:
            self._outputs.append(result)
        return result


class _Losses(Interpreter):
    """Error of each layer's output with its weight as it learns, relative to that of the first batch."""

    def __init__(self, graph: GraphModule, roundings: Mapping[int, _Rounding]) -> None:
        super().__init__(graph)
        self._graph, self._roundings = graph, roundings
        self._targets: Iterator[Tensor] = iter(())
        self._losses: list[Tensor] = []
        self._first: list[Tensor] = []

    def see(self, batch: Tensor, targets: list[Tensor]) -> list[Tensor]:
        """Run a batch with the weights as they would be rounded now."""
        self._targets, self._losses = iter(targets), []
        with torch.no_grad():
            for rounding in self._roundings.values():
                rounding.weight.copy_(rounding.hard())
            self.run(batch)
        return self._losses

    def run_node(self, n: Node) -> Any:
        argument = n.args[1] if operator(n) in WEIGHTED else None
        weight = None
        if isinstance(argument, Node) and argument.op == "call_module":
            weight = attribute(self._graph, argument.args[0])
        rounding = self._roundings.get(id(weight))
        if rounding is not None:
            args = list(self.fetch_args_kwargs_from_env(n)[0])
            target = next(self._targets)
            result = super().run_node(n)
            place = len(self._losses)
            if place == len(self._first):  # the first batch, with every weight on the nearer side
                self._first.append((result - target).square().mean().clamp_min(torch.finfo(target.dtype).tiny))
            with torch.enable_grad():
                args[1] = rounding.soft()
                output = n.target(*args)  # type: ignore[operator]
                self._losses.append((output - target).square().mean() / self._first[place])
            return result
        return super().run_node(n)
