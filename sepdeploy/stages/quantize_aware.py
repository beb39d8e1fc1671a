"""Quantization-aware training: what fine-tuning left learns to live with the rounding of its int8 files."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from sepdeploy.analyze.flow_graph import capture_graph, fixed_batch_size
from sepdeploy.core.conv import Trace
from sepdeploy.core.int8 import PlaceRange
from sepdeploy.core.options import ConvertOptions
from sepdeploy.core.progress import Progress
from sepdeploy.core.training import RecoveryStep, TrainOptions
from sepdeploy.data.images import ImageSet
from sepdeploy.errors import UnsupportedModelError
from sepdeploy.passes.fold_batchnorm import unfold_batchnorm
from sepdeploy.quantize.simulate import fake_quantized
from sepdeploy.stages.int8 import prepare_for_int8, without_lone_norms
from sepdeploy.stages.load import Inputs
from sepdeploy.stages.numerics import fold_network
from sepdeploy.train.finetune import finetune
from sepdeploy.train.optimization import peak_learning_rate

__all__ = ["TrainedForInt8", "qat_options", "require_simulation", "train_for_int8"]

_EPOCHS_RATIO = 0.25
_RATE_RATIO = 0.001
"""Of the fine-tuning's: the network is where it should be, and only has to get used to the rounding. AdamW moves each
weight by about the rate in each step, whatever the gradient: 3e-4 would be an int8 step within ten, and all noise."""


@dataclass(frozen=True, slots=True)
class TrainedForInt8:
    """A network with the ranges that it was trained with.

    Attributes:
        network: In the structure that it had, its batch norms doing nothing any more.
        step: What it won, measured with rounding; `is_kept` is False where nothing was won and nothing is changed.
        places: Ranges that its files must have.
    """

    network: nn.Module
    step: RecoveryStep
    places: tuple[PlaceRange, ...]


def require_simulation(inputs: Inputs) -> None:
    """See that the rounding of the network's int8 files can be simulated, which takes seconds; training takes hours.

    Raises:
        UnsupportedModelError: if it cannot.
    """
    try:
        capture_graph(inputs.network, inputs.example())
    except UnsupportedModelError as error:
        raise UnsupportedModelError(
            f"--qat trains through a simulation of int8, but {error}, or leave out --qat"
        ) from (error)


class _OneByOne(nn.Module):
    """Runs a graph that takes one image at a time on each image of a batch.

    Args:
        graph: Returns a tuple of tensors, each with the image as the first axis.
    """

    def __init__(self, graph: nn.Module) -> None:
        super().__init__()
        self.graph = graph

    def forward(self, batch: Tensor) -> tuple[Tensor, ...]:
        """Outputs for images (N, ...), each (N, ...)."""
        outputs = [self.graph(image) for image in torch.split(batch, 1)]
        return tuple(torch.cat(parts) for parts in zip(*outputs, strict=True))


def train_for_int8(
    network: nn.Module,
    inputs: Inputs,
    traced: Trace,
    images: ImageSet,
    held_out: ImageSet,
    options: ConvertOptions,
    folder: Path,
    progress: Progress,
) -> TrainedForInt8:
    """Distillation as in `train/finetune.py`, through the simulated int8 network.

    Batch norms are folded or written as convolutions, and channels rescaled, first, so that weights and activations are
    rounded exactly as the files round them, with the ranges found on the calibration images, which stay as they are.
    Features are not compared: the graph that is trained has none of the modules any more.

    Raises:
        UsageError: if images and options do not fit, or training diverges.
        UnsupportedModelError: if the network's data flow cannot be captured.
    """
    without_norms = fold_network(network, traced, inputs.example().numpy())
    folded, norms = without_lone_norms(without_norms.network, inputs.example())  # as its files will be without them
    prepared = prepare_for_int8(options.int8, inputs, traced, folded, options.seed)
    graph = capture_graph(prepared.network, inputs.example())
    student: nn.Module = fake_quantized(graph, {place.name: place.affine for place in prepared.places})
    if fixed_batch_size(graph) is not None:
        student = _OneByOne(student)
    trained, step, _ = finetune(
        student,
        inputs.network,
        images,
        held_out,
        qat_options(options.training),
        features=(),
        folder=folder,
        progress=progress,
        by_damage=True,  # some hundred labels do not tell such small changes from chance
    )
    _take_over(prepared.network, trained.graph if isinstance(trained, _OneByOne) else trained)
    step = replace(step, name="quantization-aware training")
    return TrainedForInt8(
        unfold_batchnorm(network, prepared.network, {**without_norms.pairs, **norms.folded}), step, prepared.places
    )


@torch.no_grad()
def _take_over(network: nn.Module, trained: nn.Module) -> None:
    """Give a network the weights of its trained graph, which has one name for each where the network may have more."""
    own = dict(network.named_parameters(remove_duplicate=False))
    for name, weight in trained.named_parameters():
        if name in own:
            own[name].copy_(weight)


def qat_options(options: TrainOptions) -> TrainOptions:
    """How to train through rounding, after a training with `options`.

    In float32: bfloat16 has 8 significant bits, and would round codes of 8 bits once more. Without labels, unless
    there is nothing else: what they teach is for the training before, and drowns what rounding has changed.
    """
    return replace(
        options,
        epochs=max(1, math.ceil(_EPOCHS_RATIO * options.epochs)),
        learning_rate=_RATE_RATIO * peak_learning_rate(options),
        feature_weight=0.0,
        label_weight=0.0 if options.distill_weight else options.label_weight,
        precision="float32",
    )
