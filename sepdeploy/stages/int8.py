"""Prepare a network for int8, once for the files of all formats."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from itertools import product
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor, nn

from sepdeploy.analyze.batch_norms import is_plain_batchnorm
from sepdeploy.analyze.flow_graph import capture_graph
from sepdeploy.core.artifact import Role
from sepdeploy.core.codec import read_json, write_json
from sepdeploy.core.conv import Trace
from sepdeploy.core.int8 import INT8_RULES, PLAIN, Affine, Int8Options, Int8Step, PlaceRange, RangeMethod
from sepdeploy.core.passing_errors import is_out_of_memory
from sepdeploy.core.progress import Progress
from sepdeploy.core.stage_store import StageStore
from sepdeploy.data.images import ImageSet
from sepdeploy.errors import UnsupportedModelError
from sepdeploy.passes.convolve_batchnorms import convolve_batchnorms, lone_batchnorms, norms_behind_layers
from sepdeploy.passes.equalize_channels import equalize_channels
from sepdeploy.passes.fold_batchnorm import fold_batchnorm
from sepdeploy.passes.replace_convs import copy_network
from sepdeploy.planning.evaluate import batch_size_for, run_network, tensor_batches
from sepdeploy.quantize.prepare import Prepared, prepare_int8
from sepdeploy.render.format_numbers import plural
from sepdeploy.stages.bundle import read_weights, save_weights
from sepdeploy.stages.load import Inputs
from sepdeploy.stages.numerics import NUMERIC_TOLERANCE, largest_error
from sepdeploy.stages.recover import held_out_images
from sepdeploy.version import __version__

__all__ = [
    "RANGE_IMAGES",
    "Int8Network",
    "Int8Record",
    "LoneNorms",
    "prepare_for_int8",
    "prepare_network",
    "range_images",
    "without_lone_norms",
]

RANGE_IMAGES = 256
"""Calibration images for the int8 ranges: they settle long before that."""

_HELD_OUT_IMAGES = 64
"""Most images that decide between methods."""


@dataclass(frozen=True, slots=True)
class LoneNorms:
    """Batch norms that float files have and int8 files do not.

    Attributes:
        folded: Layer -> the norm behind it that is folded into it.
        convolved: Norms that are depthwise convolutions.
    """

    folded: Mapping[str, str] = field(default_factory=dict)
    convolved: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Int8Record:
    """What was decided about a network before its int8 files were written; work/int8.*.json.

    Attributes:
        method: How ranges are found.
        is_changed: Whether its weights are others than those of the float files.
        sqnr_db: Of the simulated int8 network on held-out images; None where it could not be simulated.
        steps: What was tried.
        places: Ranges of its activations; tensors of a file that hold something else get their own.
        note: Why it could not be simulated.
        norms: What became of the batch norms that float files still have.
    """

    method: RangeMethod
    is_changed: bool
    sqnr_db: float | None
    steps: tuple[Int8Step, ...]
    places: tuple[PlaceRange, ...]
    note: str = ""
    norms: LoneNorms = LoneNorms()

    @property
    def has_own_source(self) -> bool:
        """Whether int8 files are made from another network than the float files."""
        return self.is_changed or bool(self.norms.folded or self.norms.convolved)


@dataclass(frozen=True, slots=True)
class Int8Network:
    """A network as its int8 files are made from it.

    Attributes:
        record: What was decided.
        network: Gives it, batch norms folded or written as convolutions.
    """

    record: Int8Record
    network: Callable[[], nn.Module]


def range_images(inputs: Inputs, seed: int) -> tuple[ImageSet, ImageSet]:
    """The calibration images that ranges come from and those that decide; the same where they are too few to split."""
    fit, held_out = held_out_images(inputs, seed)
    return fit.head(RANGE_IMAGES), held_out.head(_HELD_OUT_IMAGES)


def prepare_network(
    store: StageStore,
    options: Int8Options,
    inputs: Inputs,
    traced: Trace,
    folded: Callable[[], nn.Module],
    role: Role,
    weights_sha256: str,
    seed: int,
    progress: Progress,
    settled: tuple[PlaceRange, ...] = (),
    joined: Mapping[str, tuple[str, ...]] = MappingProxyType({}),
) -> Int8Network:
    """Find the ranges of a network, and change weights where int8 gains by it.

    Args:
        store: Remembers what was made from what.
        options: What may be tried.
        inputs: Images.
        traced: Trace of the original network.
        folded: Gives the network with its batch norms folded.
        role: Which network it is.
        weights_sha256: Hash of its weights.
        seed: Of the choice of images.
        progress: Told what is going on.
        settled: Ranges that the network was trained with; then they are kept, and so are the weights, but for dead
            channels.
        joined: Layer -> lowerings that `folded` has behind it.
    """
    weights_path, record_path = (store.work / f"int8.{role.value}{suffix}" for suffix in (".pt", ".json"))
    key = {
        **inputs.network_key(),
        "weights": weights_sha256,
        "calibration": inputs.calibration.sha256,
        "options": asdict(replace(options, io="auto")),
        "seed": seed,
        "settled": [asdict(place) for place in settled],
        "joined": dict(joined),
        "rules": INT8_RULES,
        "version": __version__,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }

    def make() -> None:
        progress.stage(f"finding the int8 ranges of the {role.value} network")
        network, norms = without_lone_norms(folded(), inputs.example())
        try:
            prepared = prepare_for_int8(options, inputs, traced, network, seed, {p.name: p.affine for p in settled})
            network, record = prepared.network, _record(prepared)
        except UnsupportedModelError as error:
            record = _unsimulated(options, str(error))
        save_weights(weights_path, network)
        write_json(record_path, replace(record, norms=norms))

    store.run(f"int8 {role.value}", key, (weights_path, record_path), make)
    record = read_json(Int8Record, record_path)
    rebuilt = cache(lambda: _rebuilt(folded(), record.norms, weights_path))
    return Int8Network(record, rebuilt if record.has_own_source else folded)


def without_lone_norms(folded: nn.Module, example: Tensor) -> tuple[nn.Module, LoneNorms]:
    """The network without the batch norms that no Conv2d precedes, and what became of them.

    Where that changes what it computes, because something else reads a norm's statistics, it stays as it is.

    Args:
        folded: In eval mode; not changed.
        example: One image, (1, ...).
    """
    names = lone_batchnorms(folded, example)
    if not names:
        return folded, LoneNorms()
    try:
        behind = norms_behind_layers(folded, names, capture_graph(folded, example))
    except UnsupportedModelError:
        behind = {}
    plain = tuple(name for name in names if is_plain_batchnorm(folded.get_submodule(name)))
    for chosen, folds in product((names, plain), (True, False)):  # the network may look into norms of other classes
        pairs = {layer: norm for layer, norm in behind.items() if folds and norm in chosen}
        norms = LoneNorms(pairs, tuple(name for name in chosen if name not in pairs.values()))
        if not chosen:
            break
        try:
            network = _rewritten(folded, norms)
            difference = largest_error(*(run_network(each, example) for each in (folded, network)))
        except Exception as error:  # whatever Python code does with what it takes for a norm
            if is_out_of_memory(error):
                raise
            continue
        if difference <= NUMERIC_TOLERANCE:
            return network, norms
    return folded, LoneNorms()


def _rewritten(folded: nn.Module, norms: LoneNorms) -> nn.Module:
    network = copy_network(folded)
    fold_batchnorm(network, norms.folded)
    convolve_batchnorms(network, norms.convolved)
    return network.eval()


def prepare_for_int8(
    options: Int8Options,
    inputs: Inputs,
    traced: Trace,
    network: nn.Module,
    seed: int,
    settled: Mapping[str, Affine] = MappingProxyType({}),
) -> Prepared:
    """The same for a network with its batch norms folded, without remembering it.

    Where no image can be held out, nothing is chosen by what it wins: on the images that it was computed on, everything
    wins.

    Raises:
        UnsupportedModelError: if the network's data flow cannot be captured.
    """
    fit, held_out = range_images(inputs, seed)
    if len(fit) + len(held_out) > len(inputs.calibration):  # they are the same
        options = replace(PLAIN, calibration_method=_method_without_judges(options))
    size = batch_size_for(traced)
    return prepare_int8(
        network,
        copy_network,
        inputs.example(),
        tensor_batches(fit, size),
        tensor_batches(held_out, size),
        len(held_out),
        options,
        _equalize,
        settled or None,
    )


def _record(prepared: Prepared) -> Int8Record:
    return Int8Record(prepared.method, prepared.is_changed, prepared.sqnr_db, prepared.steps, prepared.places)


def _method_without_judges(options: Int8Options) -> RangeMethod:
    """How ranges are found where nothing can be compared: as asked for, or so that nothing that was seen is clipped."""
    return "minmax" if options.calibration_method == "auto" else options.calibration_method


def _unsimulated(options: Int8Options, reason: str) -> Int8Record:
    method = _method_without_judges(options)
    note = f"int8 could not be simulated, so that each file has ranges of its own, by {method}: {reason}"
    return Int8Record(method, False, None, (), (), note)


def _equalize(network: nn.Module, example: Tensor, batches: Callable[[], Iterable[Tensor]]) -> str:
    layers = equalize_channels(network, example, batches)
    scaled = [layer for layer in layers if layer.scaled]
    if not scaled:
        return ""
    linear = sum(layer.is_linear for layer in scaled)
    kept = sum(layer.kept is not None for layer in layers)
    return (
        f"{plural(sum(layer.scaled for layer in scaled), 'channel')} of {plural(len(scaled), 'layer')} rescaled, "
        f"{linear} without an activation behind; {plural(kept, 'layer')} kept as they are"
    )


def _rebuilt(folded: nn.Module, norms: LoneNorms, weights: Path) -> nn.Module:
    network = _rewritten(folded, norms)
    network.load_state_dict(read_weights(weights))
    return network
