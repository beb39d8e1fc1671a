"""First stage: the network and the images, checked and ready."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from sepdeploy.core.manifest import ArchitectureSource
from sepdeploy.core.options import ConvertOptions
from sepdeploy.core.progress import Progress
from sepdeploy.core.report import DataSummary
from sepdeploy.data.images import ImageSet, open_images
from sepdeploy.data.manifest import read_manifest_preprocess
from sepdeploy.data.preprocess import Preprocess, read_preprocess
from sepdeploy.errors import UsageError
from sepdeploy.loading.arch import Architecture
from sepdeploy.loading.model import load_model
from sepdeploy.version import RULES, __version__

__all__ = ["Inputs", "architecture_source", "load_inputs", "summarize_images"]

_ALL_IMAGES = 10**9
_HELD_OUT_RATIO = 0.25


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a conversion starts from.

    Attributes:
        network: The trained network in eval mode.
        architecture: Where its code is.
        model_sha256: Hash of the checkpoint.
        calibration: Images for transfer and int8 ranges.
        validation: Images that quality is measured on; none of them is in `calibration` unless the user says so.
        train: Images to fine-tune on, none of them in `validation`; None for no fine-tuning.
        notes: What the user should know.
    """

    network: nn.Module
    architecture: ArchitectureSource
    model_sha256: str
    calibration: ImageSet
    validation: ImageSet
    train: ImageSet | None
    notes: tuple[str, ...]

    def network_key(self) -> dict[str, object]:
        """What decides how the network computes and what it takes, for the records of the stages."""
        return {
            "version": __version__,
            "rules": RULES,
            "torch": torch.__version__,
            "model": self.model_sha256,
            "arch": self.architecture.spec.rpartition(".py:")[2],  # the file is known by its hash, wherever it lies
            "code": self.architecture.sha256,
            "shape": list(self.calibration.input_shape),
            "layout": self.calibration.preprocess.layout,
        }

    def example(self) -> Tensor:
        """The first calibration image as the network takes it, batch size 1."""
        batch, _ = next(self.calibration.batches(1))
        return torch.from_numpy(batch)


def load_inputs(options: ConvertOptions, progress: Progress) -> Inputs:
    """Load the checkpoint and open the images.

    Raises:
        SepdeployError: one of its kinds for each thing that can be wrong with the files.
    """
    progress.stage("loading the model")
    loaded = load_model(options.model, options.arch)
    notes = list(loaded.notes)
    preprocess = _find_preprocess(options, notes)
    progress.stage("reading the calibration images")
    calibration = open_images(
        options.calibration,
        role="calibration",
        preprocess=preprocess,
        input_shape=options.input_shape,
        limit=options.calibration_images,
        seed=options.seed,
        progress=progress.step,
    )
    if options.validation is None:
        calibration, validation = _hold_out(calibration, options.seed, notes)
    else:
        progress.stage("reading the validation images")
        validation = open_images(
            options.validation,
            role="validation",
            preprocess=calibration.preprocess,
            input_shape=calibration.input_shape,
            limit=_ALL_IMAGES,  # with a limit the order is mixed by class, which early decisions need
            seed=options.seed,
            progress=progress.step,
        )
    train = _open_train(options, calibration, validation, notes, progress)
    is_same_path = options.validation == options.calibration and not options.calibration.endswith(".toml")
    if options.validation is not None and (is_same_path or calibration.sha256 == validation.sha256):
        notes.append("--validation holds the calibration images too: every quality here is better than it really is")
    for images in (calibration, validation, *(() if train is None else (train,))):
        if images.skipped:
            names = ", ".join(images.skipped[:3]) + (", ..." if len(images.skipped) > 3 else "")
            notes.append(f"{len(images.skipped)} files in {images.path} cannot be read as images: {names}")
    return Inputs(
        network=loaded.module,
        architecture=architecture_source(loaded.architecture),
        model_sha256=loaded.weights.sha256,
        calibration=calibration,
        validation=validation,
        train=train,
        notes=tuple(dict.fromkeys(notes)),
    )


def _open_train(
    options: ConvertOptions, calibration: ImageSet, validation: ImageSet, notes: list[str], progress: Progress
) -> ImageSet | None:
    """The images of --train, of a manifest those of its calibration split, as the network takes them.

    Validation images among them are left out: a network that was trained on them would be measured too well.

    Raises:
        UsageError: if the images cannot be read, or none is left.
    """
    if options.train is None:
        return None
    progress.stage("reading the training images")
    given = open_images(
        options.train,
        role="calibration",
        preprocess=calibration.preprocess,
        input_shape=calibration.input_shape,
        seed=options.seed,
        progress=progress.step,
    )
    progress.stage("looking for validation images among the training images")
    train = given.without(validation)
    if len(train) == 0:
        raise UsageError(
            f"all {len(given)} images in {options.train} (--train) are validation images too, so none is left to train "
            "on; give other images to --train or --validation"
        )
    if left_out := len(given) - len(train):
        notes.append(f"{left_out} images of --train are validation images too and are left out of the training")
    return train


def architecture_source(architecture: Architecture) -> ArchitectureSource:
    """The architecture's place, found again from any working directory."""
    path = architecture.source_path
    return ArchitectureSource(
        architecture.spec, None if path is None else str(Path(path).expanduser().resolve()), architecture.source_sha256
    )


def summarize_images(images: ImageSet) -> DataSummary:
    """What the report says of a set of images."""
    return DataSummary(images.path, len(images), images.labels is not None, images.skipped, images.sha256)


def _find_preprocess(options: ConvertOptions, notes: list[str]) -> Preprocess | None:
    """The preprocessing that the user names, or a manifest's; None with a note if there is neither."""
    if options.preprocess is not None:
        return read_preprocess(options.preprocess)
    for path in (options.calibration, options.validation):
        if path is not None and (found := read_manifest_preprocess(Path(path))) is not None:
            return found
    notes.append(
        "no --preprocess was given: pixels are divided by 255, without mean and standard deviation; "
        "if the network was trained otherwise, every accuracy here is too low"
    )
    return None


def _hold_out(calibration: ImageSet, seed: int, notes: list[str]) -> tuple[ImageSet, ImageSet]:
    if len(calibration) < 4:
        raise UsageError(
            f"{calibration.path} has {len(calibration)} usable images, too few to hold some out; give --validation "
            "or more images"
        )
    kept, held_out = calibration.split(1 - _HELD_OUT_RATIO, seed)
    notes.append(
        f"no --validation was given: quality is measured on {len(held_out)} calibration images that were held out"
    )
    return kept, held_out
