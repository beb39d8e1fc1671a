"""How far a network is from the one that it is to imitate, as something to descend on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812 (PyTorch's own convention)
from torch import Tensor

from sepdeploy.analyze.damage import are_class_scores
from sepdeploy.analyze.trace import output_tensors
from sepdeploy.errors import UnsupportedModelError, UsageError

__all__ = ["feature_loss", "label_loss", "output_loss"]


def output_loss(student_outputs: object, teacher_outputs: object, temperature: float = 1.0) -> Tensor:
    """Distance of a network's outputs from those of the network that it imitates.

    Class scores, a single tensor (N, C): the mean over images of T^2 KL(teacher || student), both divided by the
    temperature T (Hinton et al., "Distilling the Knowledge in a Neural Network", 2015). Anything else, such as
    regression, detection and segmentation outputs: the mean over tensors of the squared error relative to the teacher's
    energy. Tensors of integers and booleans are no part of it.

    Args:
        student_outputs: What the student returned: tensors in any nesting of lists, tuples and dicts.
        teacher_outputs: What the teacher returned for the same images; no gradient goes there.
        temperature: T, above 0.

    Returns:
        A scalar, at least 0, in the precision of the outputs but at least float32.

    Raises:
        UnsupportedModelError: if the outputs differ in number or shape, or hold no real numbers.
    """
    student, teacher = output_tensors(student_outputs), output_tensors(teacher_outputs)
    if are_class_scores(teacher) and teacher[0].is_floating_point():
        _check_pairs(student, teacher)
        log_q, log_p = (
            torch.log_softmax(_at_least_float32(scores) / temperature, 1) for scores in (student[0], teacher[0])
        )
        return F.kl_div(log_q, log_p.detach(), reduction="batchmean", log_target=True) * temperature**2
    return feature_loss(student, teacher)


def feature_loss(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> Tensor:
    """Mean over features of |s - t|^2 / |t|^2, s and t being whole batches.

    Args:
        student: Features, each of any shape.
        teacher: The same features of the network that is imitated; no gradient goes there.

    Returns:
        A scalar, at least 0. A feature that is 0 throughout the teacher's batch counts with its mean squared error.

    Raises:
        UnsupportedModelError: if they differ in number or shape, or hold no real numbers.
    """
    _check_pairs(student, teacher)
    losses = [_relative_error(s, t.detach()) for s, t in zip(student, teacher, strict=True) if t.is_floating_point()]
    if not losses:
        raise UnsupportedModelError(
            "there are no tensors of real numbers to imitate; give a loss of your own in a hook"
        )
    return torch.stack(losses).mean()


def label_loss(student_outputs: object, labels: Tensor) -> Tensor:
    """Cross-entropy of class scores with the labels (N,), int64; a scalar.

    Raises:
        UsageError: if the outputs are not one score per class for every label.
    """
    outputs = output_tensors(student_outputs)
    if not are_class_scores(outputs) or len(outputs[0]) != len(labels):
        shapes = ", ".join(str(tuple(output.shape)) for output in outputs)
        raise UsageError(
            f"labels need a network that returns one score per class, (N, C), but this one returns {shapes} for "
            f"{len(labels)} images; train without labels or with a loss of your own in a hook"
        )
    return F.cross_entropy(_at_least_float32(outputs[0]), labels)


def _relative_error(student: Tensor, teacher: Tensor) -> Tensor:
    student, teacher = _at_least_float32(student), _at_least_float32(teacher)
    energy = teacher.square().sum()
    # Nothing to be relative to where the teacher is dead; 1e-12 is far below what float32 can tell from 0 in a network.
    scale = torch.where(energy > 1e-12 * teacher.numel(), energy, torch.full_like(energy, max(teacher.numel(), 1)))
    return (student - teacher).square().sum() / scale


def _at_least_float32(x: Tensor) -> Tensor:
    """Half precision, as from autocast, as float32: squares overflow there."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _check_pairs(student: Sequence[Tensor], teacher: Sequence[Tensor]) -> None:
    ours, theirs = ([tuple(tensor.shape) for tensor in tensors] for tensors in (student, teacher))
    if ours != theirs:
        raise UnsupportedModelError(
            f"the converted network returns tensors of shapes {ours}, the original {theirs}; outputs that depend on "
            "the image in number or shape cannot be imitated: return them before boxes are selected, or train in a hook"
        )
