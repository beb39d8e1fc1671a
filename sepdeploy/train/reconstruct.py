"""Block reconstruction: a converted network learns from the original, block by block, without labels.

Each block is trained to return what the original's returns at the same place, on the inputs that the blocks before it
really give, so that what they could not repair is repaired as far as this one can (Li et al., "BRECQ: Pushing the
Limit of Post-Training Quantization by Block Reconstruction", 2021; Molchanov et al., "LANA: Latency Aware Network
Acceleration", 2022). Then all blocks are trained together on the outputs and on the ends of the blocks. Batch norms
keep their statistics throughout, and held-out images decide what is kept.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sepdeploy.analyze.blocks import Block
from sepdeploy.analyze.damage import network_damage
from sepdeploy.analyze.trace import trace_network
from sepdeploy.core.passing_errors import is_out_of_memory
from sepdeploy.core.progress import Progress
from sepdeploy.core.quiet import error_summary
from sepdeploy.core.training import ReconstructOptions, RecoveryStep
from sepdeploy.data.images import ImageSet
from sepdeploy.errors import SepdeployError, UnsupportedModelError
from sepdeploy.train.augment import Augmenter, tolerated_augmentations
from sepdeploy.train.block_ends import run_to, untrainable, weights_by_block
from sepdeploy.train.checkpoint import read_checkpoint, run_key, write_checkpoint
from sepdeploy.train.features import FeatureTap
from sepdeploy.train.losses import feature_loss, output_loss

__all__ = ["reconstruct"]

_MAX_MACS = 2e14
"""Multiply-accumulates of all training steps together, about: larger networks get fewer steps."""

_MAX_PASSES = (15, 60)
"""How often a block, and all of them together, see each image: few images have little more to tell after that."""

_EVALUATION_MACS = 2e12
"""The same of one look at held-out images: larger networks get fewer of those."""

_HELD_OUT_IMAGES = (64, 512)
_AUGMENT_IMAGES = 256
"""Images on which it is decided what may be done to them."""

_BATCH_BYTES = 2 * 2**30
"""Activations that a backward pass through the whole network may keep: larger networks get smaller batches."""

_STEPS_PER_LOOK = 50
"""Steps between two looks at held-out images, after which a checkpoint is written."""

_TEMPERATURE = 2.0


def reconstruct(
    student: nn.Module,
    teacher: nn.Module,
    blocks: Sequence[Block],
    fit: ImageSet,
    held_out: ImageSet,
    options: ReconstructOptions,
    *,
    checkpoint: Path | None,
    progress: Progress,
) -> tuple[nn.Module, RecoveryStep]:
    """Train the blocks of a converted network to imitate the original's.

    A block's own weights are trained by Adam on the relative squared error of its output, then those of all blocks on
    the divergence of the outputs and the error of all ends of blocks together. Each phase keeps the state that was best
    on held-out images. Networks are trained on a GPU if there is one. Activations are held for one batch only.

    Args:
        student: The converted network in eval mode with its batch norms; it is not changed. Weights with
            requires_grad=False stay as they are.
        teacher: The original network in eval mode; it is not changed.
        blocks: As `find_blocks` gives them; both networks have modules of these names.
        fit: Images to train on; labels are not used.
        held_out: Other images, which decide.
        options: Steps, rates and augmentation; the steps are upper bounds.
        checkpoint: File that a later call with the same networks, images and options goes on from, with the same result
            as if it had never stopped. It is left there at the end. None writes nothing.
        progress: Told about blocks and steps.

    Returns:
        A copy of the student in eval mode on the CPU with its new weights, or with those that it had if they change the
        outputs less; and how much was won. A network that cannot be trained comes back as it was, with the reason.

    Raises:
        UsageError: if images cannot be read or the checkpoint cannot be written.
        UnsupportedModelError: if the networks do not run, or do not call the modules that end blocks.
    """
    run = _Reconstruction(student, teacher, tuple(blocks), fit, held_out, options, checkpoint, progress)
    return run.result()


@dataclass(frozen=True, slots=True)
class _Phase:
    """Some weights, what they are trained for, and how that is judged.

    Attributes:
        title: For the user.
        weights: Names of the weights that are trained.
        steps: Optimizer steps.
        first_step: Steps of the phases before it.
        loss: Of a batch, to descend on.
        score: On held-out images; smaller is better.
    """

    title: str
    weights: tuple[str, ...]
    steps: int
    first_step: int
    loss: Callable[[Tensor], Tensor]
    score: Callable[[], float]


@dataclass(slots=True)
class _State:
    """Where a run is, as its checkpoint keeps it.

    Attributes:
        phase: Phases that are over.
        step: Steps of the present one that are over; its first look at held-out images is over if `score` is a number.
        score: Best of the present phase so far.
        damage_before: Of the student as given.
        best: Those of the present phase at its best.
        optimizer: State of the optimizer.
        improved: Titles of the phases that won something.
        unstable: Titles of the phases whose loss overflowed.
    """

    phase: int = 0
    step: int = 0
    score: float = math.nan
    damage_before: float = math.nan
    best: dict[str, Tensor] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    improved: list[str] = field(default_factory=list)
    unstable: list[str] = field(default_factory=list)


class _Reconstruction:
    """One run: networks, images and how many of them are affordable."""

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        blocks: tuple[Block, ...],
        fit: ImageSet,
        held_out: ImageSet,
        options: ReconstructOptions,
        checkpoint: Path | None,
        progress: Progress,
    ) -> None:
        self.given = student
        self.blocks, self.fit, self.options = blocks, fit, options
        self.checkpoint, self.progress = checkpoint, progress
        example = torch.from_numpy(next(held_out.batches(1))[0])
        self.student, self.teacher, self.device = _place(student, teacher, example)
        self.weights = {name: weight for name, weight in self.student.named_parameters() if weight.requires_grad}
        example = example.to(self.device)
        self.macs = tuple(trace_network(network, example).total_macs for network in (self.teacher, self.student))
        low, high = _HELD_OUT_IMAGES
        affordable = min(high, max(low, int(_EVALUATION_MACS / max(sum(self.macs), 1))))
        # Shuffled: in the order of files, classes may not be mixed.
        self.judged = held_out.shuffled(options.seed).head(affordable)
        self.owned, bytes_per_image = weights_by_block(self.student, blocks, example)
        self.batch_size = max(1, min(options.batch_size, len(fit), _BATCH_BYTES // max(bytes_per_image, 1)))
        self.augmenter = self._augmenter()
        self.key = run_key(student, teacher, fit, held_out, options, tuple(map(repr, (*blocks, self.batch_size))))

    def result(self) -> tuple[nn.Module, RecoveryStep]:
        """Run all phases, or what is left of them."""
        phases = self._phases()
        state = self._restore() or _State(damage_before=self._damage())
        try:
            while state.phase < len(phases):
                self._train(phases[state.phase], state)
                if state.phase + 1 < len(phases):
                    state.score = math.nan
                state.phase, state.step, state.best, state.optimizer = state.phase + 1, 0, {}, {}
                self._save(state)
            detail = self._detail(phases, state)
        except UnsupportedModelError as error:
            if is_out_of_memory(error):
                raise
            state.score, detail = state.damage_before, str(error)
        is_kept = state.score < state.damage_before
        network = self.student.cpu() if is_kept else _copy(self.given).cpu()
        for weight, given in zip(network.parameters(), self.given.parameters(), strict=True):
            weight.requires_grad_(given.requires_grad)
            weight.grad = None
        images = len(self.judged)
        step = RecoveryStep("reconstruction", state.damage_before, state.score, images, is_kept, detail)
        return network.eval(), step

    def _phases(self) -> list[_Phase]:
        """Every block in order, then all of them together."""
        block_steps, network_steps = self._affordable_steps()
        phases: list[_Phase] = []
        for number, (block, owned) in enumerate(zip(self.blocks, self.owned, strict=True), 1):
            title = f"block {number} of {len(self.blocks)}" + (f", up to {block.name}" if block.name else "")
            first_step = len(phases) * block_steps
            loss, score = self._block_loss(block.name), self._block_score(block.name)
            phases.append(_Phase(title, owned, block_steps, first_step, loss, score))
        everything = tuple(name for owned in self.owned for name in owned)
        first_step = len(phases) * block_steps
        loss = self._network_loss()
        return [*phases, _Phase("all blocks", everything, network_steps, first_step, loss, self._damage)]

    def _train(self, phase: _Phase, state: _State) -> None:
        """Train the weights of one phase and leave them at their best, going on from `state`."""
        self.progress.stage(f"reconstruction: {phase.title}")
        for name, weight in self.student.named_parameters():
            weight.requires_grad_(name in phase.weights)
        weights = {name: self.weights[name] for name in phase.weights}
        if math.isnan(state.score):
            state.score, state.best = _finite(phase.score()), _copies(weights)
        if not weights:
            return
        optimizer = torch.optim.Adam(weights.values())
        if state.optimizer:
            optimizer.load_state_dict(state.optimizer)
        batches = self._batches(phase.first_step + state.step)
        for step in range(state.step, phase.steps):
            rate = _one_cycle(step, phase.steps) * self.options.learning_rate
            if not _descend(optimizer, rate, phase.loss, next(batches)):
                state.unstable.append(phase.title)
                break
            done = step + 1
            self.progress.step(done, phase.steps)
            if done % _STEPS_PER_LOOK == 0 or done == phase.steps:
                score = _finite(phase.score())
                if score < state.score:
                    state.score, state.best = score, _copies(weights)
                    if phase.title not in state.improved:
                        state.improved.append(phase.title)
                state.step, state.optimizer = done, optimizer.state_dict()
                self._save(state)
        _write(weights, state.best)

    def _block_loss(self, name: str) -> Callable[[Tensor], Tensor]:
        def loss(batch: Tensor) -> Tensor:
            with torch.no_grad():
                target = run_to(self.teacher, name, batch)
            reached = run_to(self.student, name, batch)
            return feature_loss(reached, target) if name else output_loss(reached, target)

        return loss

    def _block_score(self, name: str) -> Callable[[], float]:
        loss = self._block_loss(name)

        @torch.no_grad()
        def score() -> float:
            total = sum(float(loss(batch)) * len(batch) for batch in self._judged_batches())
            return total / len(self.judged)

        return score

    def _network_loss(self) -> Callable[[Tensor], Tensor]:
        names = [block.name for block in self.blocks if block.name]

        def loss(batch: Tensor) -> Tensor:
            with torch.no_grad(), FeatureTap(self.teacher, names) as tap:
                target_outputs = self.teacher(batch.clone())
                target_features = tap.features
            with FeatureTap(self.student, names) as tap:
                outputs = self.student(batch.clone())
                total = output_loss(outputs, target_outputs, _TEMPERATURE)
                return total + feature_loss(tap.features, target_features) if names else total

        return loss

    def _damage(self) -> float:
        return network_damage(self.teacher, self.student, self._judged_batches())

    def _judged_batches(self) -> Iterator[Tensor]:
        for batch, _ in self.judged.batches(self.batch_size):
            yield torch.from_numpy(batch).to(self.device)

    def _batches(self, first_step: int) -> Iterator[Tensor]:
        """Augmented batches from step `first_step` of the whole run on; each depends on its step's number alone."""
        per_epoch = len(self.fit) // self.batch_size
        step = first_step
        while True:
            epoch, skipped = divmod(step, per_epoch)
            batches = self.fit.shuffled(self.options.seed + epoch).batches(self.batch_size)
            for batch, _ in islice(batches, skipped, per_epoch):
                generator = torch.Generator().manual_seed((self.options.seed * 1_000_003 + step) % 2**63)
                yield self.augmenter(torch.from_numpy(batch), generator).to(self.device)
                step += 1

    def _augmenter(self) -> Augmenter:
        layout = self.fit.preprocess.layout
        names = self.options.augment
        if names is None:
            images = self.fit.head(_AUGMENT_IMAGES).batches(self.batch_size)
            names = tolerated_augmentations(
                self.teacher, (torch.from_numpy(batch).to(self.device) for batch, _ in images), layout
            )
        return Augmenter(names, layout)

    def _affordable_steps(self) -> tuple[int, int]:
        """Steps per block and of all together, within `_MAX_PASSES`, such that all stays near `_MAX_MACS`."""
        teacher, student = self.macs
        count = max(len(self.blocks), 1)
        # Forward passes end with the block, half-way on average; backward passes take twice the forward pass.
        all_blocks = (teacher + student) * (count + 1) / 2 + 2 * student
        per_pass = len(self.fit) / self.batch_size
        asked = (self.options.block_steps, self.options.network_steps)
        steps = [min(each, math.ceil(passes * per_pass)) for each, passes in zip(asked, _MAX_PASSES, strict=True)]
        work = self.batch_size * (steps[0] * all_blocks + steps[1] * (teacher + 3 * student))
        share = min(1.0, _MAX_MACS / max(work, 1))
        block_steps, network_steps = (math.ceil(each * share) for each in steps)
        return block_steps, network_steps

    def _detail(self, phases: Sequence[_Phase], state: _State) -> str:
        if not any(phase.weights for phase in phases):
            return "no gradient reaches the converted layers"
        block_steps, network_steps = phases[0].steps, phases[-1].steps
        is_cut = (block_steps, network_steps) != (self.options.block_steps, self.options.network_steps)
        return "; ".join(
            (
                f"{len(self.blocks)} blocks of {block_steps} steps, {network_steps} of all together"
                + (" (fewer than asked for: the network is large or the images are few)" if is_cut else ""),
                f"{self.batch_size} of {len(self.fit)} images a step",
                f"augmentation: {', '.join(self.augmenter.names) or 'none'}",
                f"better on held-out images: {len(state.improved)} of {len(phases)}",
                *(f"{title} became unstable and went back to its best state" for title in state.unstable),
            )
        )

    def _save(self, state: _State) -> None:
        if self.checkpoint is not None:
            fields = {name: getattr(state, name) for name in _State.__slots__}
            write_checkpoint(self.checkpoint, self.key, {**fields, "weights": _copies(self.weights)})

    def _restore(self) -> _State | None:
        """The state of an earlier run with the same inputs, its weights put into the student."""
        fields = None if self.checkpoint is None else read_checkpoint(self.checkpoint, self.key)
        if fields is None:
            return None
        _write(self.weights, fields.pop("weights"))
        return _State(**fields)


def _descend(optimizer: torch.optim.Optimizer, rate: float, loss_of: Callable[[Tensor], Tensor], batch: Tensor) -> bool:
    """One step at the learning rate `rate`; False, and none, where the loss is not finite.

    Raises:
        UnsupportedModelError: if the network fails, or writes in place over what gradients need.
    """
    for group in optimizer.param_groups:
        group["lr"] = rate
    try:
        loss = loss_of(batch)
        if not math.isfinite(loss.item()):
            return False
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
    except SepdeployError:
        raise
    except Exception as error:  # user code: whatever it raises
        raise untrainable(error) from error
    optimizer.step()
    return True


def _one_cycle(step: int, steps: int) -> float:
    """Ratio of the highest learning rate in step `step`, from 0: up for 30% of the steps, then down to 0, by cosines.

    Smith and Topin, "Super-Convergence: Very Fast Training of Neural Networks Using Large Learning Rates", 2018.
    """
    rise = 0.3 * steps
    if step < rise:
        return 0.52 - 0.48 * math.cos(math.pi * step / rise)
    return 0.5 + 0.5 * math.cos(math.pi * (step - rise) / (steps - rise))


def _place(student: nn.Module, teacher: nn.Module, example: Tensor) -> tuple[nn.Module, nn.Module, torch.device]:
    """A copy of the student and the teacher where they are trained: on a GPU if both run there, else on the CPU."""
    student = _copy(student)
    if torch.cuda.is_available():
        try:
            moved = (_copy(network).to("cuda") for network in (student, teacher))
            on_gpu = [network for network in moved if network(example.to("cuda")) is not None]
            return on_gpu[0], on_gpu[1], torch.device("cuda")
        except Exception:  # user code that makes tensors on the CPU, too little memory, ...
            torch.cuda.empty_cache()
    return student, teacher, torch.device("cpu")


def _copy(network: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(network)
    except Exception as error:  # user objects raise whatever they like on being copied
        raise UnsupportedModelError(f"the network cannot be copied: {error_summary(error)}") from error


def _copies(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: weight.detach().clone() for name, weight in weights.items()}


@torch.no_grad()
def _write(weights: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    for name, value in values.items():
        weights[name].copy_(value)


def _finite(score: float) -> float:
    """Worse than any number where the network overflowed."""
    return score if math.isfinite(score) else math.inf
