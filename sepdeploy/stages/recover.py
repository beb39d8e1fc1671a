"""Win accuracy back after the transfer, step by step, each a stage of its own with its network in work/."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from sepdeploy.analyze.blocks import find_blocks
from sepdeploy.analyze.damage import network_damage
from sepdeploy.core.codec import read_json, to_json, write_json
from sepdeploy.core.conv import Trace
from sepdeploy.core.files import sha256_of_bytes, sha256_of_file, write_bytes
from sepdeploy.core.int8 import INT8_RULES, PlaceRange
from sepdeploy.core.options import ConvertOptions
from sepdeploy.core.plan import Plan
from sepdeploy.core.progress import Progress
from sepdeploy.core.stage_store import StageStore
from sepdeploy.core.training import RecoveryStep
from sepdeploy.data.images import ImageSet
from sepdeploy.errors import ContractError, UsageError
from sepdeploy.planning.evaluate import batch_size_for, tensor_batches
from sepdeploy.stages.bundle import read_weights, rebuild, save_weights
from sepdeploy.stages.guard import TRANSFERRED
from sepdeploy.stages.launch import Processes
from sepdeploy.stages.load import Inputs
from sepdeploy.train.hooks import FinetuneContext, Hook, run_hook, take_weights

__all__ = ["Recovered", "Recovery", "Weights"]

_HELD_OUT_RATIO = 0.25
"""Share of the calibration images by which every step is judged and on which no step is computed.

The transfer before them has used all: so the network that a step has to beat knows these images, and the step does not.
"""

_MIN_IMAGES = 4
"""Fewer calibration images are not split: they serve for both."""

_JUDGES = (10, 1000)
"""Fewest and most of the training images that are held out; sets too small for the fewest are judged by the calibration
images that are held out."""

_JUDGES_RATIO = 0.1


@dataclass(frozen=True, slots=True)
class Recovered:
    """A network on its way, as it lies in work/.

    Attributes:
        name: Of its file, without suffix.
        network: In eval mode on the CPU.
        steps: What was tried on the way to it.
        ranges: Of its activations in int8, where it was trained with them.
    """

    name: str
    network: nn.Module
    steps: tuple[RecoveryStep, ...] = ()
    ranges: tuple[PlaceRange, ...] = ()


@dataclass(frozen=True, slots=True)
class Weights:
    """Weights that were trained elsewhere.

    Attributes:
        given: A network or a state dict.
        source: What it is, for messages.
    """

    given: nn.Module | Mapping[str, Tensor]
    source: str


@dataclass(frozen=True, slots=True)
class _Record:
    """What a step leaves beside its weights: its own steps and those before it, and ranges that it was trained with."""

    steps: tuple[RecoveryStep, ...]
    ranges: tuple[PlaceRange, ...] = ()


@dataclass(frozen=True, slots=True)
class _Made:
    """What a step has made.

    Attributes:
        network: In eval mode.
        steps: What was tried.
        ranges: As of `Recovered`.
    """

    network: nn.Module
    steps: tuple[RecoveryStep, ...]
    ranges: tuple[PlaceRange, ...] = ()


def held_out_images(inputs: Inputs, seed: int) -> tuple[ImageSet, ImageSet]:
    """The calibration images as those to compute on and those to judge by; the same where they are too few to split."""
    if len(inputs.calibration) < _MIN_IMAGES:
        return inputs.calibration, inputs.calibration
    return inputs.calibration.split(1 - _HELD_OUT_RATIO, seed)


def training_images(images: ImageSet, held_out: ImageSet, seed: int) -> tuple[ImageSet, ImageSet]:
    """The images of --train as those to train on and those to judge by.

    Calibration images are often training images too: the held-out ones among them would judge what they have taught.
    """
    fewest, most = _JUDGES
    judges = min(most, int(_JUDGES_RATIO * len(images)))
    return (images, held_out) if judges < fewest else images.split(1 - judges / len(images), seed)


class Recovery:
    """The steps that can follow the transfer, on one bundle.

    Args:
        store: Remembers what was made from what; None for a process that only takes part in the training.
        folder: The bundle.
        options: How.
        inputs: Images and the original network.
        traced: Its trace.
        plan: What is replaced.
        progress: Told what is going on.
        processes: Those that train together.
    """

    def __init__(
        self,
        store: StageStore | None,
        folder: Path,
        options: ConvertOptions,
        inputs: Inputs,
        traced: Trace,
        plan: Plan,
        progress: Progress,
        processes: Processes,
    ) -> None:
        self._store, self._work, self._options, self._inputs = store, folder / "work", options, inputs
        self._traced, self._plan, self._progress, self._processes = traced, plan, progress, processes
        self.fit, self.held_out = held_out_images(inputs, options.seed)
        batch_size = batch_size_for(traced)
        self._fit_batches = tensor_batches(self.fit, batch_size)
        self._held_out_batches = tensor_batches(self.held_out, batch_size)

    @property
    def replaces_anything(self) -> bool:
        """Whether there is anything to recover from."""
        return bool(self._plan.replaced)

    def reopen(self, name: str) -> Recovered:
        """A network that an earlier run left, checked.

        Raises:
            UsageError: if its files have changed.
        """
        is_guards = name == TRANSFERRED  # which are checked with the plan
        if self._store is not None and not is_guards and not self._store.is_intact(name, self.files(name)):
            raise UsageError(f"{self._weights_path(name)} has changed; run 'sepdeploy convert' again")
        return self.open(name)

    def open(self, name: str) -> Recovered:
        """A network that an earlier step left."""
        network = rebuild(self._inputs.network, self._plan, read_weights(self._weights_path(name)))
        if name == TRANSFERRED:
            return Recovered(name, network)
        record = read_json(_Record, self._record_path(name))
        return Recovered(name, network, record.steps, record.ranges)

    def files(self, name: str) -> tuple[Path, ...]:
        """What a step writes."""
        return (self._weights_path(name), self._record_path(name))

    def recalibrate(self, before: Recovered) -> Recovered:
        """Batch norm statistics and biases for what the network computes now."""
        from sepdeploy.transfer.recalibrate import recalibrate

        def make() -> _Made:
            self._progress.stage("re-estimating batch norms and biases")
            network, steps = recalibrate(
                self._inputs.network,
                before.network,
                self._traced,
                self._plan,
                self._fit_batches,
                self._held_out_batches,
            )
            return _Made(network, steps)

        return self._step("recalibrated", before, {"threads": torch.get_num_threads()}, make)

    def reconstruct(self, before: Recovered) -> Recovered:
        """Blocks that imitate the original's."""
        options = self._options.reconstruct
        if options is None:
            raise ContractError("there is nothing to reconstruct")
        from sepdeploy.train.reconstruct import reconstruct

        checkpoint = self._work / "reconstruct_checkpoint.pt"

        def make() -> _Made:
            self._progress.stage("reconstructing blocks")
            blocks = find_blocks(self._inputs.network, self._inputs.example(), tuple(self._plan.replaced))
            network, step = reconstruct(
                before.network,
                self._inputs.network,
                blocks,
                self.fit,
                self.held_out,
                options,
                checkpoint=checkpoint,
                progress=self._progress,
            )
            return _Made(network, (step,))

        key = {"options": repr(options), "threads": torch.get_num_threads()}
        reconstructed = self._step("reconstructed", before, key, make)
        checkpoint.unlink(missing_ok=True)
        return reconstructed

    def adopt(self, before: Recovered, weights: Weights) -> Recovered:
        """Weights that were trained elsewhere."""

        def make() -> _Made:
            self._progress.stage("taking over the weights")
            network = take_weights(weights.given, before.network, self._inputs.example(), weights.source)
            return _Made(network, (self._judged("adopted", before.network, network, weights.source),))

        return self._step("adopted", before, {"nonce": uuid.uuid4().hex}, make)

    def finetune(self, before: Recovered) -> Recovered:
        """Distillation from the original on the images of --train."""
        images = self._inputs.train
        if images is None:
            raise ContractError("there is nothing to fine-tune on")
        from sepdeploy.train.finetune import finetune

        def make() -> _Made:
            self._progress.stage("fine-tuning")
            own, judges = training_images(images, self.held_out, self._options.seed)
            network, step, _ = finetune(
                before.network,
                self._inputs.network,
                own,
                judges,
                self._options.training,
                features=self._block_ends(),
                folder=self._work / "finetune",
                progress=self._progress,
            )
            return _Made(network, (step,))

        # The number of processes and threads is not in it: a training is too dear to do it again for rounding.
        key: dict[str, object] = {"options": repr(self._options.training), "images": images.sha256}
        return self._step("finetuned", before, key, make)

    def train_for_int8(self, before: Recovered) -> Recovered:
        """Distillation through the rounding of the int8 files."""
        images = self._inputs.train
        if images is None:
            raise ContractError("there is nothing to train on")
        from sepdeploy.stages.quantize_aware import train_for_int8

        def make() -> _Made:
            self._progress.stage("quantization-aware training")
            own, judges = training_images(images, self.held_out, self._options.seed)
            trained = train_for_int8(
                before.network,
                self._inputs,
                self._traced,
                own,
                judges,
                self._options,
                self._work / "finetune_int8",
                self._progress,
            )
            if not trained.step.is_kept:
                return _Made(before.network, (trained.step,))
            return _Made(trained.network, (trained.step,), trained.places)

        key: dict[str, object] = {
            "options": repr(self._options.training),
            "int8": repr(self._options.int8),
            "rules": INT8_RULES,
            "images": images.sha256,
        }
        return self._step("finetuned_int8", before, key, make)

    def run_hook(self, before: Recovered, hook: Hook) -> Recovered:
        """The user's own training; its result is kept, as it is the user's decision."""

        def make() -> _Made:
            self._progress.stage(f"running the hook {hook.name}")
            context = FinetuneContext(
                train=self._inputs.train,
                calibration=self.fit,
                held_out=self.held_out,
                preprocess=self._inputs.calibration.preprocess,
                replaced=tuple(self._plan.replaced),
                blocks=self._block_ends(),
                seed=self._options.training.seed,
                folder=self._work / "hook",
                progress=self._progress,
            )
            network = run_hook(hook, before.network, self._inputs.network, context)
            return _Made(network, (self._judged("hook", before.network, network, hook.name),))

        images = None if self._inputs.train is None else self._inputs.train.sha256
        key: dict[str, object] = {
            "images": images,
            "hook": hook.key or {"nonce": uuid.uuid4().hex},
            "training_seed": self._options.training.seed,
        }
        return self._step("hooked", before, key, make)

    def finish(self, last: Recovered) -> None:
        """Make `last` the bundle's model.pt."""
        if self._store is None:
            return
        store, path, source = self._store, self._store.folder / "model.pt", self._weights_path(last.name)

        def make() -> None:
            data = source.read_bytes()
            store.before_change()
            write_bytes(path, data)

        store.run("model", {"weights": sha256_of_file(source)}, (path,), make)

    def _step(
        self,
        name: str,
        before: Recovered,
        key: dict[str, object],
        make: Callable[[], _Made],
    ) -> Recovered:
        """Run a step unless its result is there; the first process decides, all take part in what is decided."""
        if self._store is None:
            if self._processes.told(None):
                return Recovered(name, make().network)
            return self.open(name)
        inputs = {
            **self._inputs.network_key(),
            "plan": sha256_of_bytes(to_json(self._plan).encode()),
            "weights": sha256_of_file(self._weights_path(before.name)),
            "steps": sha256_of_bytes(to_json(_Record(before.steps)).encode()),
            "calibration": self._inputs.calibration.sha256,
            "seed": self._options.seed,
            **key,
        }
        is_current = self._store.is_current(name, inputs, self.files(name))
        self._processes.told(not is_current)
        self._store.run(name, inputs, self.files(name), partial(self._make, name, before, make))
        return self.open(name)

    def _make(self, name: str, before: Recovered, make: Callable[[], _Made]) -> None:
        made = make()
        weights_path, record_path = self.files(name)
        save_weights(weights_path, made.network)
        write_json(record_path, _Record((*before.steps, *made.steps), made.ranges))

    def _judged(self, name: str, before: nn.Module, after: nn.Module, detail: str) -> RecoveryStep:
        """A step that is kept whatever it does, with what it does."""
        damages = [
            network_damage(self._inputs.network, network, self._held_out_batches()) for network in (before, after)
        ]
        return RecoveryStep(name, damages[0], damages[1], len(self.held_out), is_kept=True, detail=detail)

    def _block_ends(self) -> tuple[str, ...]:
        """Modules whose features both networks have; the outputs are compared anyway."""
        blocks = find_blocks(self._inputs.network, self._inputs.example(), tuple(self._plan.replaced))
        return tuple(block.name for block in blocks if block.name)

    def _weights_path(self, name: str) -> Path:
        return self._work / f"{name}.pt"

    def _record_path(self, name: str) -> Path:
        return self._work / f"{name}.json"
