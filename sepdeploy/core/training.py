"""Options and records of everything that trains: reconstruction and fine-tuning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from sepdeploy.errors import UsageError

__all__ = [
    "AugmentName",
    "BatchNormMode",
    "EpochMetrics",
    "OptimizerName",
    "ReconstructOptions",
    "RecoveryStep",
    "TrainOptions",
    "TrainPrecision",
]

AugmentName = Literal["flip", "shift", "zoom", "color"]
"""Mirror left and right; move by up to an eighth; cut out and enlarge; brightness and contrast."""

OptimizerName = Literal["adamw", "sgd"]

BatchNormMode = Literal["train", "frozen"]
"""Whether batch norms use the statistics of each training batch, or keep those that they have."""

TrainPrecision = Literal["auto", "float32", "bfloat16", "float16"]
"""Type of the activations in training; auto is bfloat16 on GPUs that have it, else float16 there, float32 on CPUs."""


@dataclass(frozen=True, slots=True)
class ReconstructOptions:
    """How blocks are trained to imitate the original's, without labels.

    Attributes:
        block_steps: Most optimizer steps per block.
        network_steps: Most steps of all blocks together, afterwards.
        batch_size: Images per step.
        learning_rate: Of Adam, at its highest.
        augment: What is done to images; None takes what the original network's outputs tolerate.
        seed: Of the order of images and of their augmentation.

    Raises:
        UsageError: if a number is out of range.
    """

    block_steps: int = 100
    network_steps: int = 1600
    batch_size: int = 128
    learning_rate: float = 3e-3
    augment: tuple[AugmentName, ...] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.block_steps < 0 or self.network_steps < 0 or self.batch_size < 1 or not 0 < self.learning_rate < 10:
            raise UsageError("steps must be at least 0, the batch size at least 1, the learning rate between 0 and 10")
        _check_augment(self.augment)


@dataclass(frozen=True, slots=True)
class TrainOptions:
    """How a converted network is fine-tuned.

    Attributes:
        epochs: Passes over the training images.
        batch_size: Images per step, over all processes together.
        optimizer: 'adamw' or 'sgd' (Nesterov momentum 0.9).
        learning_rate: At its highest, after the warm-up; None is 3e-3 for AdamW and 0.05 for SGD.
        weight_decay: Of weights with two or more dimensions; None is 1e-2 for AdamW and 5e-4 for SGD.
        warmup_ratio: Share of the steps in which the rate rises; a cosine brings it down to 0 afterwards.
        ema_decay: Of the exponential moving average of the weights, which is what is kept; 0 for none.
        precision: Of the activations.
        distill_weight: Of the distance between the outputs and the original's.
        feature_weight: Of the distance between the features at the ends of blocks and the original's.
        label_weight: Of the cross-entropy with labels, where there are some.
        temperature: Class scores are divided by this before their divergence is taken.
        batch_norm: What batch norms do.
        augment: What is done to images; None takes what the original network's outputs tolerate.
        seed: Of the order of images and of their augmentation.
        is_quantization_aware: Whether the network is trained once more afterwards, a quarter as long and at a
            thousandth of the rate, with weights and activations rounded as in its int8 files.

    Raises:
        UsageError: if a number is out of range.
    """

    epochs: int = 10
    batch_size: int = 128
    optimizer: OptimizerName = "adamw"
    learning_rate: float | None = None
    weight_decay: float | None = None
    warmup_ratio: float = 0.05
    ema_decay: float = 0.999
    precision: TrainPrecision = "auto"
    distill_weight: float = 1.0
    feature_weight: float = 1.0
    label_weight: float = 0.5
    temperature: float = 2.0
    batch_norm: BatchNormMode = "train"
    augment: tuple[AugmentName, ...] | None = None
    seed: int = 0
    is_quantization_aware: bool = False

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 1:
            raise UsageError("--epochs and --batch-size must be at least 1")
        if self.learning_rate is not None and not 0 < self.learning_rate < 10:
            raise UsageError(f"--learning-rate must be above 0 and below 10, got {self.learning_rate:g}")
        if not 0 <= self.ema_decay < 1 or not 0 <= self.warmup_ratio < 1 or not self.temperature > 0:
            raise UsageError("the EMA decay and the warm-up must be at least 0 and below 1, the temperature above 0")
        if min(self.distill_weight, self.feature_weight, self.label_weight, self.weight_decay or 0.0) < 0:
            raise UsageError("weights of losses and weight decay cannot be negative")
        for value, choices in (
            (self.optimizer, OptimizerName),
            (self.precision, TrainPrecision),
            (self.batch_norm, BatchNormMode),
        ):
            if value not in get_args(choices):
                raise UsageError(f"'{value}' is not one of {', '.join(get_args(choices))}")
        _check_augment(self.augment)


@dataclass(frozen=True, slots=True)
class EpochMetrics:
    """One epoch of fine-tuning; a line of metrics.jsonl.

    Attributes:
        epoch: From 1.
        step: Optimizer steps so far.
        learning_rate: At the end of the epoch.
        loss: Mean training loss of the epoch, over all processes.
        held_out_damage: Change of the outputs against the original on held-out images (`analyze/damage.py`), of the
            weights that would be kept.
        held_out_accuracy_ratio: Top-1 on held-out images with labels; None without.
        seconds: Of the epoch, held-out images included.
    """

    epoch: int
    step: int
    learning_rate: float
    loss: float
    held_out_damage: float
    held_out_accuracy_ratio: float | None
    seconds: float


@dataclass(frozen=True, slots=True)
class RecoveryStep:
    """One try to win accuracy back on the whole network, decided on held-out images.

    Attributes:
        name: 'batch norm re-estimation', 'bias correction', 'reconstruction', 'fine-tuning',
            'quantization-aware training', 'hook' or 'adopted'.
        damage_before: Change of the outputs against the original on `images` held-out images (`analyze/damage.py`).
        damage_after: The same with the step.
        images: Held-out images.
        is_kept: Whether the step was kept; False restores what was before.
        detail: What it did, for the user: steps, epochs, images.
    """

    name: str
    damage_before: float
    damage_after: float
    images: int
    is_kept: bool
    detail: str = ""


def _check_augment(names: tuple[str, ...] | None) -> None:
    wrong = set(names or ()) - set(get_args(AugmentName))
    if wrong:
        raise UsageError(f"there is no augmentation '{min(wrong)}'; choose from {', '.join(get_args(AugmentName))}")
