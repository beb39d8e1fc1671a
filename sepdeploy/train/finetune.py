"""Fine-tuning: a converted network learns from the original, in one process or many."""

from __future__ import annotations

import copy
import itertools
import math
import time
from contextlib import closing, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn

from sepdeploy.core.progress import Progress, Silent
from sepdeploy.core.training import AugmentName, EpochMetrics, RecoveryStep, TrainOptions
from sepdeploy.data.images import ImageSet
from sepdeploy.errors import ContractError, UsageError
from sepdeploy.train.augment import Augmenter, tolerated_augmentations
from sepdeploy.train.average import WeightAverage
from sepdeploy.train.batch_norms import synchronize_batch_norms, train_batch_norms
from sepdeploy.train.checkpoint import read_checkpoint, run_key, tensor_state, write_checkpoint
from sepdeploy.train.journal import Journal
from sepdeploy.train.objective import Objective, Standing, TappedNetwork, class_count, labels_fit
from sepdeploy.train.optimization import learning_rate, make_optimizer, peak_learning_rate
from sepdeploy.train.processes import ahead, equalize, make_accelerator, shared_batch_size

__all__ = ["finetune"]

_MAX_GRADIENT_NORM = 5.0
"""Longer gradients are shortened to this."""

_AUGMENT_IMAGES = 256
"""Training images on which it is decided what may be done to them."""

_REPORT_STEPS = 10
"""Steps between reports of progress, and between looks at whether the weights are still finite."""


def finetune(
    student: nn.Module,
    teacher: nn.Module,
    images: ImageSet,
    held_out: ImageSet,
    options: TrainOptions,
    *,
    features: tuple[str, ...],
    folder: Path,
    progress: Progress,
    by_damage: bool = False,
) -> tuple[nn.Module, RecoveryStep, tuple[EpochMetrics, ...]]:
    """Train a converted network to do what the original does.

    The loss is a weighted sum of the distance of the outputs from the original's, that of the features, and, for
    class scores with labels, the cross-entropy (Hinton et al., "Distilling the Knowledge in a Neural Network", 2015;
    Romero et al., "FitNets", 2015). Each epoch ends with a measurement of the averaged weights on held-out images, and
    the best epoch is what is returned: that of the highest accuracy if there are labels, and of the least damage
    (`analyze/damage.py`) otherwise and among equals.

    Every process of an `accelerate launch` calls this alike. Each batch is divided among them; the images, their
    augmentation and the loss are the same as with one process, and so are the weights with frozen batch norms, up to
    rounding. With `batch_norm='train'` the statistics are those of the whole batch on GPUs, where plain batch norms
    become SyncBatchNorm meanwhile, but those of the process's own part on CPUs. All processes return equal weights; the
    first alone reads and writes `folder`.

    Of all modules only batch norms are ever in training mode. They are frozen anyway where a process gets a single
    image per step. If there are fewer images than `options.batch_size`, a batch is all of them, or the most that the
    processes can share evenly; otherwise the images that do not fill the last batch of an epoch are left out of it.

    A checkpoint is written after each epoch. A later call with the same networks, images and options goes on from
    there as if it had never stopped, bit for bit on a CPU; a call with others starts anew.

    Args:
        student: The converted network in eval mode; it is not changed. Weights with requires_grad=False stay as they
            are.
        teacher: The original network in eval mode; it is not changed.
        images: Training images, with or without labels.
        held_out: Images that decide, with or without labels.
        options: How to train.
        features: Names of modules, in both networks, whose outputs are compared.
        folder: For `checkpoint.pt`, `metrics.jsonl` and TensorBoard events.
        progress: Told about epochs and steps, in the first process.
        by_damage: Whether damage decides, and not accuracy, even where there are labels.

    Returns:
        A copy of the student in eval mode on the CPU in float32 with the best weights, or with those that it had if no
        epoch was better; how much was won; and the metrics of all epochs.

    Raises:
        UsageError: if images, labels, processes, precision and options do not fit together, or training diverges.
        UnsupportedModelError: if the networks cannot be compared, or the original returns NaN.
    """
    accelerator = make_accelerator(options.precision)
    is_main = accelerator.is_main_process
    told = progress if is_main else Silent()
    run = _Run(accelerator, student, teacher, images, held_out, options, features, told, by_damage=by_damage)
    path = folder / "checkpoint.pt"
    key = run_key(student, teacher, images, held_out, options, features, by_damage=by_damage) if is_main else ""
    run.restore(read_checkpoint(path, key) if is_main else None)
    with closing(Journal(folder, run.history)) if is_main else nullcontext() as journal:
        while len(run.history) < options.epochs:
            metrics = run.train_epoch()
            if journal is not None:
                write_checkpoint(path, key, run.state())
                journal.add(metrics)
    network = copy.deepcopy(student).float().cpu().eval()
    return network, run.finish(network), tuple(run.history)


class _Run:
    """State of one run in one process."""

    def __init__(
        self,
        accelerator: Accelerator,
        student: nn.Module,
        teacher: nn.Module,
        images: ImageSet,
        held_out: ImageSet,
        options: TrainOptions,
        features: tuple[str, ...],
        progress: Progress,
        *,
        by_damage: bool,
    ) -> None:
        processes, device = accelerator.num_processes, accelerator.device
        self.accelerator, self.options, self.progress = accelerator, options, progress
        self.images, self.held_out = images, held_out
        self.batch_size = shared_batch_size(options.batch_size, len(images), processes)
        self.steps_per_epoch = len(images) // self.batch_size
        self.trains_norms = options.batch_norm == "train" and self.batch_size > processes
        self.history: list[EpochMetrics] = []
        self.best: tuple[int, Standing, dict[str, Tensor]] | None = None

        features = tuple(name for name in features if name and options.feature_weight)  # '' is the outputs themselves
        original, self.network = (copy.deepcopy(network).float().eval().to(device) for network in (teacher, student))
        tapped_original = TappedNetwork(original.requires_grad_(False), features)
        example = torch.from_numpy(next(images.head(1).batches(1))[0]).to(device)
        with torch.no_grad():
            classes = class_count(tapped_original(example)[0])
        judged = (classes, original, self.batch_size, accelerator)
        uses_labels, reason = labels_fit(images, *judged) if options.label_weight else (False, "")
        self.measures_accuracy, other_reason = (False, "") if by_damage else labels_fit(held_out, *judged)
        self.ignored_labels = tuple(dict.fromkeys(filter(None, (reason, other_reason))))
        self.objective = Objective(tapped_original, options, uses_labels, accelerator)
        tapped = TappedNetwork(self.network, features)
        self.objective.check(tapped, example)
        self.average = WeightAverage(self.network, options.ema_decay) if options.ema_decay else None
        self.augmenter = Augmenter(self._augmentations(original), images.preprocess.layout)
        self.start = self.measure()

        if self.trains_norms and processes > 1 and device.type == "cuda":
            synchronize_batch_norms(self.network)
        self.optimizer: Any
        self.tapped, self.optimizer = accelerator.prepare(tapped, make_optimizer(self.network, options))

    def _augmentations(self, original: nn.Module) -> tuple[AugmentName, ...]:
        """What is done to images, the same in all processes."""
        if self.options.augment is not None:
            return self.options.augment
        some = self.images.shuffled(self.options.seed).head(_AUGMENT_IMAGES)
        batches = (torch.from_numpy(batch).to(self.accelerator.device) for batch, _ in some.batches(self.batch_size))
        names = tolerated_augmentations(original, batches, self.images.preprocess.layout)
        decided: tuple[AugmentName, ...] = broadcast_object_list([names])[0]
        return decided

    def train_epoch(self) -> EpochMetrics:
        """Train for one more epoch and measure where that has led; only `history` and `best` remember it."""
        began, epoch = time.perf_counter(), len(self.history)
        self.progress.stage(self._headline(epoch))
        if self.trains_norms:
            train_batch_norms(self.network)
        shard = (self.accelerator.process_index, self.accelerator.num_processes)
        batches = self.images.shuffled(self.options.seed + epoch).batches(self.batch_size, shard=shard)
        first, total = epoch * self.steps_per_epoch, torch.zeros((), device=self.accelerator.device)
        for index, (batch, labels) in enumerate(ahead(itertools.islice(batches, self.steps_per_epoch))):
            loss, gradient_norm = self._step(first + index, batch, labels)
            total += loss
            if (index + 1) % _REPORT_STEPS == 0 or index + 1 == self.steps_per_epoch:
                # Scaled gradients of float16 may overflow; such steps are left out, and the scale adapts.
                self._require_finite(0.0 if self.accelerator.scaler else float(gradient_norm))
                self.progress.step(index + 1, self.steps_per_epoch)
        loss = sum(gather_object([float(total)])) / self.accelerator.num_processes / self.steps_per_epoch
        self._require_finite(loss)
        self.network.eval()
        standing = self.measure()
        steps = first + self.steps_per_epoch
        metrics = EpochMetrics(
            epoch=epoch + 1,
            step=steps,
            learning_rate=learning_rate(self.options, steps - 1, self._total_steps),
            loss=loss,
            held_out_damage=standing.damage,
            held_out_accuracy_ratio=standing.accuracy_ratio,
            seconds=time.perf_counter() - began,
        )
        self.history.append(metrics)
        if self.best is None or standing.is_better_than(self.best[1]):
            self.best = (epoch + 1, standing, tensor_state(self._kept_network))
        return metrics

    def _step(self, step: int, batch: np.ndarray, labels: np.ndarray | None) -> tuple[Tensor, Tensor]:
        """One step of the optimizer on this process's part of a batch; its loss and the norm of all gradients."""
        rate = learning_rate(self.options, step, self._total_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        device = self.accelerator.device
        x = self._augmented(torch.from_numpy(batch).to(device), step)
        targets = None if labels is None else torch.from_numpy(labels).to(device)
        outputs, features = self.tapped(x)
        loss = self.objective.loss(x, targets, outputs, features)
        self.optimizer.zero_grad()
        self.accelerator.backward(loss)
        norm = self.accelerator.clip_grad_norm_(self.network.parameters(), _MAX_GRADIENT_NORM)
        self.optimizer.step()
        if self.average:
            self.average.update(self.network, step)
        return loss.detach(), norm

    def _augmented(self, part: Tensor, step: int) -> Tensor:
        """Random numbers are drawn for the whole batch, and each process uses those of its images."""
        generator = torch.Generator().manual_seed((self.options.seed * 1_000_003 + step) % 2**63)
        draws = self.augmenter.draw(self.batch_size, generator)
        first = self.accelerator.process_index * len(part)
        return self.augmenter.apply(part, draws[first : first + len(part)])

    def measure(self) -> Standing:
        """Measure the weights that would be kept on the held-out images, after making them equal in all processes."""
        equalize(self._kept_network)
        return self.objective.measure(
            self._kept_network, self.held_out, self.batch_size, with_labels=self.measures_accuracy
        )

    def state(self) -> dict[str, Any]:
        """Everything that training goes on from, as tensors and plain data."""
        epoch, standing, weights = self._best
        return {
            "network": tensor_state(self.network),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else None,
            "average": tensor_state(self.average.network) if self.average else None,
            "best": {"epoch": epoch, "standing": asdict(standing), "weights": weights},
            "history": [asdict(metrics) for metrics in self.history],
        }

    def restore(self, state: dict[str, Any] | None) -> None:
        """Go on from what `state` returned in the first process; None there begins anew."""
        state = broadcast_object_list([state])[0]
        if state is None:
            return
        self.network.load_state_dict(state["network"], strict=False)  # what is no tensor is the network's own
        self.optimizer.load_state_dict(state["optimizer"])
        if self.accelerator.scaler:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        if self.average:
            self.average.network.load_state_dict(state["average"], strict=False)
        best = state["best"]
        self.best = (best["epoch"], Standing(**best["standing"]), best["weights"])
        self.history = [EpochMetrics(**metrics) for metrics in state["history"]]

    def finish(self, network: nn.Module) -> RecoveryStep:
        """Put the best weights into `network`, a copy of the student, if they are better than its own."""
        epoch, standing, weights = self._best
        is_kept = standing.is_better_than(self.start)
        if is_kept:
            network.load_state_dict(weights, strict=False)
        detail = (
            f"{len(self.history)} epochs of {self.steps_per_epoch} steps with {self.batch_size} images, "
            f"augmentation: {', '.join(self.augmenter.names) or 'none'}; the best was epoch {epoch}"
        )
        if not self.trains_norms:
            detail += "; batch norms frozen"
        if self.ignored_labels:
            detail += f"; labels ignored: {', and '.join(self.ignored_labels)}"
        return RecoveryStep("fine-tuning", self.start.damage, standing.damage, len(self.held_out), is_kept, detail)

    @property
    def _kept_network(self) -> nn.Module:
        return self.average.network if self.average else self.network

    @property
    def _best(self) -> tuple[int, Standing, dict[str, Tensor]]:
        if self.best is None:
            raise ContractError("no epoch is over")
        return self.best

    @property
    def _total_steps(self) -> int:
        return self.options.epochs * self.steps_per_epoch

    def _headline(self, epoch: int) -> str:
        text = f"fine-tuning: epoch {epoch + 1} of {self.options.epochs}"
        if self.history:
            text += f", held-out damage {self.history[-1].held_out_damage:.3g}"
        return text

    def _require_finite(self, value: float) -> None:
        if not math.isfinite(value):
            kept = f"; the checkpoint of epoch {len(self.history)} is kept" if self.history else ""
            raise UsageError(
                f"the training diverged in epoch {len(self.history) + 1}: its loss is NaN or infinite; give a "
                f"--learning-rate below {peak_learning_rate(self.options):g}{kept}"
            )
