"""Everything that is decided about a network before its int8 files are written, once for all formats.

What int8 costs is simulated in PyTorch (`simulate.py`) and judged by the SQNR of the outputs on held-out images: first
which method gives the ranges, then whether to rescale channels, to correct biases and to round adaptively. A step that
does not pay on images that it has not seen is undone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from sepdeploy.analyze.flow_graph import capture_graph, fixed_batch_size
from sepdeploy.core.int8 import CALIBRATION_METHODS, Affine, Int8Options, Int8Step, PlaceRange, RangeMethod
from sepdeploy.errors import ContractError
from sepdeploy.quantize.correct_biases import correct_biases
from sepdeploy.quantize.file_ranges import PROBES, fingerprint
from sepdeploy.quantize.lift_dead_channels import has_dead_channels, lift_dead_channels
from sepdeploy.quantize.ranges import affine_of_range, range_of
from sepdeploy.quantize.round_adaptively import round_adaptively
from sepdeploy.quantize.simulate import fake_quantized, observe, prescribed_affines, quantized_places, watch

__all__ = ["Batches", "Prepared", "prepare_int8", "sqnr_db"]

Batches = Callable[[], Iterable[Tensor]]
"""Starts a pass over images, (N, ...) at a time."""

Equalizer = Callable[[nn.Module, Tensor, Batches], str]
"""Rescales channels of a network in place, given an image and images, and says what it did."""

_MIN_GAIN_DB = 0.5
"""What a step must win to be kept: it costs a float file of its own to quantize from."""

_LARGEST_DB = 200.0
"""SQNR of outputs without any error."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A network that is ready to be quantized.

    Attributes:
        network: With the same function as before, or nearly so where weights were rounded or biases corrected.
        is_changed: Whether its weights are others than before.
        method: How its ranges were found.
        places: They.
        sqnr_db: Of the simulated int8 network on held-out images.
        steps: What was tried.
    """

    network: nn.Module
    is_changed: bool
    method: RangeMethod
    places: tuple[PlaceRange, ...]
    sqnr_db: float
    steps: tuple[Int8Step, ...]


@dataclass(frozen=True, slots=True)
class _State:
    """A network with its ranges and what they are worth."""

    network: nn.Module
    graph: GraphModule
    method: RangeMethod
    affines: Mapping[str, Affine]
    sqnr_db: float
    tried: Mapping[RangeMethod, float]


class _Judge:
    """Compares simulated int8 networks with the float network on held-out images."""

    def __init__(self, network: nn.Module, example: Tensor, batches: Batches, images: int) -> None:
        self._reference, self._batches, self.images = capture_graph(network, example), batches, images

    def sqnr_db(self, graph: GraphModule) -> float:
        """Of `graph` against the original."""
        return sqnr_db(self._reference, graph, self._batches())


@torch.no_grad()
def sqnr_db(reference: nn.Module, network: nn.Module, batches: Iterable[Tensor]) -> float:
    """Signal-to-quantization-noise ratio of all outputs, 10 log10(sum y^2 / sum (y - y')^2), at most 200 dB."""
    signal = noise = 0.0
    for batch in batches:
        for expected, found in zip(_tensors(reference(batch)), _tensors(network(batch)), strict=True):
            if expected.is_floating_point():
                wanted = expected.double()
                signal += float(wanted.square().sum())
                noise += float((wanted - found).square().sum())
    if not noise > signal * 10 ** (-_LARGEST_DB / 10):
        return _LARGEST_DB if noise == noise else -_LARGEST_DB
    return max(-_LARGEST_DB, 10 * math.log10(max(signal, 1e-30) / noise))


def _tensors(returned: object) -> list[Tensor]:
    from torch.utils._pytree import tree_leaves

    return [leaf for leaf in tree_leaves(returned) if isinstance(leaf, Tensor)]


@torch.no_grad()
def prepare_int8(
    network: nn.Module,
    copy: Callable[[nn.Module], nn.Module],
    example: Tensor,
    fit: Batches,
    held_out: Batches,
    held_out_images: int,
    options: Int8Options,
    equalize: Equalizer | None,
    fixed: Mapping[str, Affine] | None = None,
) -> Prepared:
    """Find ranges, and change weights where int8 gains by it.

    Args:
        network: In eval mode, its batch norms folded; not changed.
        copy: Copies a network.
        example: One image, (1, ...).
        fit: Calibration images; their first ones are those that tensors of files are compared on.
        held_out: Images that decide.
        held_out_images: How many they are.
        options: What may be tried.
        equalize: Rescales channels; None leaves that out.
        fixed: Ranges that are settled, as after training with them; then nothing is tried.

    Raises:
        UnsupportedModelError: if the network's data flow cannot be captured.
        ContractError: if `fixed` ranges are those of another network.
    """
    graph = capture_graph(network, example)
    is_single = fixed_batch_size(graph) is not None
    fit, held_out = (_rebatched(each, is_single=is_single) for each in (fit, held_out))
    judge = _Judge(network, example, held_out, held_out_images)
    if fixed is not None:
        names = {node.name for node in quantized_places(graph)}
        if names != fixed.keys():
            raise ContractError(f"the ranges that were trained with do not fit {sorted(names ^ fixed.keys())}")
        value = judge.sqnr_db(fake_quantized(graph, fixed))
        return _finished(_State(network, graph, "minmax", fixed, value, {}), copy, example, judge, fit)
    state = _calibrated(network, graph, fit, judge, options)
    steps = [_calibration_step(state, judge.images)]
    start = state

    def attempt(name: str, change: Callable[[nn.Module, _State], str]) -> None:
        nonlocal state
        changed = copy(state.network)
        detail = change(changed, state)
        if not detail:
            return
        then = _calibrated(changed, capture_graph(changed, example), fit, judge, options)
        is_kept = then.sqnr_db >= state.sqnr_db + _MIN_GAIN_DB
        steps.append(Int8Step(name, state.sqnr_db, then.sqnr_db, judge.images, is_kept, detail))
        state = then if is_kept else state

    if options.equalizes and equalize is not None:
        attempt("equalisation", lambda changed, _: equalize(changed, example, fit))
    if options.rounds_adaptively:
        attempt("adaptive rounding", lambda changed, now: round_adaptively(changed, example, now.affines, fit))
    if options.corrects_bias:
        attempt("bias correction", lambda changed, now: correct_biases(changed, example, now.affines, fit))
    finished = _finished(state, copy, example, judge, fit)
    return replace(finished, is_changed=finished.is_changed or state is not start, steps=tuple(steps))


def _finished(
    state: _State, copy: Callable[[nn.Module], nn.Module], example: Tensor, judge: _Judge, fit: Batches
) -> Prepared:
    """The network as it is handed over, its dead channels lifted: no choice, for files would lose their biases."""
    network, graph, value = state.network, state.graph, state.sqnr_db
    is_changed = has_dead_channels(graph, state.affines)
    if is_changed:
        network = copy(network)
        graph = capture_graph(network, example)
        lift_dead_channels(graph, state.affines)
        value = judge.sqnr_db(fake_quantized(graph, state.affines))
    return Prepared(network, is_changed, state.method, _places(graph, state.affines, fit), value, ())


def _rebatched(batches: Batches, *, is_single: bool) -> Batches:
    def start() -> Iterator[Tensor]:
        for batch in batches():
            yield from torch.split(batch, 1) if is_single else (batch,)

    return start


def _calibrated(network: nn.Module, graph: GraphModule, fit: Batches, judge: _Judge, options: Int8Options) -> _State:
    """The network with the ranges of the best method."""
    histograms = observe(graph, fit())
    wanted = options.calibration_method
    methods: tuple[RangeMethod, ...] = CALIBRATION_METHODS if wanted == "auto" else (wanted,)
    tried: dict[RangeMethod, float] = {}
    results: dict[RangeMethod, dict[str, Affine]] = {}
    prescribed = prescribed_affines(graph)
    for method in methods:
        found = {name: affine_of_range(*range_of(each, method)) for name, each in histograms.items()}
        results[method] = found | prescribed
        tried[method] = judge.sqnr_db(fake_quantized(graph, results[method]))
    best = max(methods, key=lambda method: tried[method])  # the first of equals
    return _State(network, graph, best, results[best], tried[best], tried)


def _calibration_step(state: _State, images: int) -> Int8Step:
    first = next(iter(state.tried))
    detail = ", ".join(f"{method} {value:.1f} dB" for method, value in state.tried.items())
    return Int8Step("calibration", state.tried[first], state.sqnr_db, images, True, f"{state.method}: {detail}")


def _places(graph: GraphModule, affines: Mapping[str, Affine], fit: Batches) -> tuple[PlaceRange, ...]:
    """The ranges with what identifies their tensors."""
    prints: dict[str, list[tuple[float, ...]]] = {name: [] for name in affines}
    nodes = [node for node in quantized_places(graph) if node.name in affines]
    images = [image for _, image in zip(range(PROBES), _rebatched(fit, is_single=True)(), strict=False)]
    watch(graph, nodes, images, lambda node, value: prints[node.name].append(fingerprint(value.numpy(force=True))))
    return tuple(PlaceRange(name, affine, tuple(prints[name])) for name, affine in affines.items())
