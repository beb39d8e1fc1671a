"""What fine-tuning descends on, and what it is judged by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from sepdeploy.analyze.damage import are_class_scores, output_change
from sepdeploy.analyze.trace import output_tensors
from sepdeploy.core.training import TrainOptions
from sepdeploy.data.images import ImageSet
from sepdeploy.errors import UnsupportedModelError, UsageError
from sepdeploy.train.features import FeatureTap
from sepdeploy.train.losses import feature_loss, label_loss, output_loss

__all__ = ["Objective", "Standing", "TappedNetwork", "class_count", "labels_fit"]

_LABELLED_IMAGES = 512
"""Images on which it is decided whether labels are those of the network's classes."""

_LEAST_OF_TWO, _LEAST_OF_MANY = 0.6, 0.05
"""Accuracy that is no chance any more with two classes, and with very many."""


class TappedNetwork(nn.Module):
    """A network that returns its output tensors and its features: all that the loss depends on, in one pass."""

    def __init__(self, network: nn.Module, features: tuple[str, ...]) -> None:
        super().__init__()
        self.network = network
        self.features = features

    def forward(self, batch: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """The output tensors in pytree order, and those of the modules `features`."""
        with FeatureTap(self.network, self.features) as tap:
            # A copy: networks may normalize their input in place.
            outputs = output_tensors(self.network(batch.clone()))
            return outputs, list(tap.features)


@dataclass(frozen=True, slots=True)
class Standing:
    """How good a network is on the held-out images.

    Attributes:
        damage: Change of the outputs against the original (`analyze/damage.py`).
        accuracy_ratio: Top-1; None without labels.
    """

    damage: float
    accuracy_ratio: float | None

    def is_better_than(self, other: Standing) -> bool:
        """By accuracy where there is one; by damage otherwise and among equals."""
        return (self.accuracy_ratio or 0.0, -self.damage) > (other.accuracy_ratio or 0.0, -other.damage)


class Objective:
    """Distance from the original network.

    Args:
        teacher: The original, in eval mode, on the device of the training.
        options: Weights of the parts of the loss.
        uses_labels: Whether the loss has a part for labels.
        accelerator: Knows the other processes.
    """

    def __init__(
        self, teacher: TappedNetwork, options: TrainOptions, uses_labels: bool, accelerator: Accelerator
    ) -> None:
        self._teacher = teacher
        self._options = options
        self._uses_labels = uses_labels
        self._accelerator = accelerator

    def loss(self, batch: Tensor, labels: Tensor | None, outputs: list[Tensor], features: list[Tensor]) -> Tensor:
        """The loss of this process's part of a batch, such that the mean over processes is that of the whole.

        Args:
            batch: Images on the device.
            labels: (N,), int64, or None.
            outputs: What the student returned for them.
            features: Its features.
        """
        with torch.no_grad(), self._accelerator.autocast():
            wanted_outputs, wanted_features = self._teacher(batch)
        options = self._options
        total = torch.zeros((), device=batch.device)
        if options.distill_weight:
            if are_class_scores(wanted_outputs):
                distance = output_loss(outputs, wanted_outputs, options.temperature)
            else:
                distance = self._relative_loss(outputs, wanted_outputs)
            total = total + options.distill_weight * distance
        if features:
            total = total + options.feature_weight * self._relative_loss(features, wanted_features)
        if self._uses_labels and labels is not None:
            total = total + options.label_weight * label_loss(outputs, labels)
        return total

    def _relative_loss(self, student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
        """`feature_loss` of the whole batch: errors are relative to the energy in the parts of all processes."""
        pairs = [(s, t) for s, t in zip(student, teacher, strict=True) if t.is_floating_point()]
        energies = torch.stack([t.float().square().sum() for _, t in pairs])
        means = self._accelerator.reduce(energies, "mean")
        shares = torch.where(means > 0, energies / means, torch.ones_like(means))
        return (torch.stack([feature_loss([s], [t]) for s, t in pairs]) * shares).mean()

    def check(self, student: TappedNetwork, batch: Tensor) -> None:
        """Run both networks in eval mode on `batch` and compare what they return.

        Raises:
            UnsupportedModelError: if the original returns NaN or infinity, or the two do not match.
            UsageError: if every part of the loss has the weight 0.
        """
        with torch.no_grad():
            (outputs, features), (wanted_outputs, wanted_features) = student(batch), self._teacher(batch)
        if not all(bool(torch.isfinite(tensor).all()) for tensor in wanted_outputs):
            raise UnsupportedModelError(
                "the original network returns NaN or infinite values, which nothing can imitate; check its weights and "
                "the mean and std of the images"
            )
        options = self._options
        if options.distill_weight:
            output_loss(outputs, wanted_outputs)
        if features:
            feature_loss(features, wanted_features)
        if not (options.distill_weight or features or self._uses_labels):
            raise UsageError("there is nothing to learn from: the weights of all parts of the loss that apply are 0")

    @torch.no_grad()
    def measure(self, network: nn.Module, images: ImageSet, batch_size: int, *, with_labels: bool) -> Standing:
        """Compare `network`, in eval mode, with the original; the processes share the images.

        Args:
            network: On the device of the training.
            images: Held-out images.
            batch_size: Images at once, over all processes.
            with_labels: Whether to count correct class scores.
        """
        accelerator = self._accelerator
        change, energy, correct = 0.0, 0.0, 0
        for batch, labels in images.batches(batch_size, shard=(accelerator.process_index, accelerator.num_processes)):
            if not len(batch):
                continue
            x = torch.from_numpy(batch).to(accelerator.device)
            before = [output.cpu() for output in output_tensors(self._teacher.network(x.clone()))]
            after = [output.cpu() for output in output_tensors(network(x))]
            part = output_change(before, after)
            change, energy = change + part[0], energy + part[1]
            if with_labels and labels is not None:
                correct += int((after[0].argmax(1) == torch.from_numpy(labels)).sum())
        sums = [sum(parts) for parts in zip(*gather_object([(change, energy, correct)]), strict=True)]
        return Standing(sums[0] / max(sums[1], 1e-30), sums[2] / len(images) if with_labels else None)


def class_count(outputs: Sequence[Tensor]) -> int | None:
    """Classes of a network with these outputs; None if they are no class scores."""
    return outputs[0].shape[1] if are_class_scores(outputs) else None


def labels_fit(
    images: ImageSet, classes: int | None, original: nn.Module, batch_size: int, accelerator: Accelerator
) -> tuple[bool, str]:
    """Whether the images have labels for the original network's classes; all processes decide alike.

    Folders are numbered in the order of their names, which may be another than that of the classes, or they may be no
    classes at all: the labels count only if the original itself is right about them clearly more often than by chance.

    Args:
        images: With labels or without.
        classes: What the original tells apart; None if it returns no class scores.
        original: In eval mode, on the device of the training.
        batch_size: Images at once, over all processes.
        accelerator: Knows the other processes.

    Returns:
        Whether the labels are to be used, and, where there are some that are not, why.

    Raises:
        UsageError: if they are numbers that such a network does not know.
    """
    if images.labels is None or classes is None:
        return False, ""
    if images.class_names and len(images.class_names) != classes:
        return False, f"{images.path} has {len(images.class_names)} class folders, but the network {classes} classes"
    highest = int(images.labels.max())
    if highest >= classes:
        raise UsageError(
            f"the labels in {images.path} go up to {highest}, but the network has {classes} classes, 0 to "
            f"{classes - 1}; give images with its own labels, or without any"
        )
    some = images.shuffled(0).head(_LABELLED_IMAGES)
    correct = _correct(original, some, batch_size, accelerator)
    by_chance = _LEAST_OF_TWO if classes == 2 else max(2 / classes, _LEAST_OF_MANY)
    if correct <= by_chance * len(some):
        return False, f"the original network is right about {correct} of {len(some)} images in {images.path} only"
    return True, ""


@torch.no_grad()
def _correct(network: nn.Module, images: ImageSet, batch_size: int, accelerator: Accelerator) -> int:
    """Labelled images whose largest class score is that of the label; the processes share them."""
    correct = 0
    for batch, labels in images.batches(batch_size, shard=(accelerator.process_index, accelerator.num_processes)):
        if len(batch) and labels is not None:
            scores = output_tensors(network(torch.from_numpy(batch).to(accelerator.device)))[0].cpu()
            correct += int((scores.argmax(1) == torch.from_numpy(labels)).sum())
    return sum(gather_object([correct]))
