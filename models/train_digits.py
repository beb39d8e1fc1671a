"""Train `models/digits.pt`, the checkpoint of the quick start: `python models/train_digits.py`.

The splits and the preprocessing come from calibration/digits.toml, so training, conversion and validation agree. The
images before the validation split are trained on, with small random shifts, turns and scales. The same seed gives the
same weights on the same machine and version of PyTorch: one thread, deterministic algorithms, one seeded generator.
"""

from __future__ import annotations

import argparse
import os
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812  the name that PyTorch users know
from numpy.typing import NDArray
from PIL import Image
from torch import Generator, Tensor, nn

if not __package__:  # run as a file: PEP 366's way to keep the relative import working
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    __package__ = "models"

from .digits import digits_cnn, load_images

__all__ = ["DigitSplits", "accuracy_ratio", "load_splits", "main", "save_weights", "train"]

REPOSITORY = Path(__file__).resolve().parents[1]
BATCH_SIZE = 64
PEAK_LEARNING_RATE = 3e-3
WEIGHT_DECAY = 0.05
LABEL_SMOOTHING = 0.1
MAX_TURN_DEGREES = 12.0
MAX_SHIFT_RATIO = 0.1
MAX_SCALE_CHANGE = 0.12


@dataclass(frozen=True, slots=True)
class DigitSplits:
    """The digits as the network sees them.

    Attributes:
        train_images: Normalised, (N, 1, 32, 32), float32.
        train_labels: (N,), int64.
        validation_images: Images of other indices, (M, 1, 32, 32), float32.
        validation_labels: (M,), int64.
        background: What a normalised pixel without ink is.
    """

    train_images: Tensor
    train_labels: Tensor
    validation_images: Tensor
    validation_labels: Tensor
    background: float


def load_splits(manifest: Path) -> DigitSplits:
    """Read the digits and preprocess them as the manifest states; all that is not validation is for training."""
    with manifest.open("rb") as file:
        settings = tomllib.load(file)
    preprocess = settings["preprocess"]
    mean, std = preprocess["mean"][0], preprocess["std"][0]
    images, labels = load_images()
    x = (_resize(images, preprocess["size"], preprocess["interpolation"]) - mean) / std
    y = torch.from_numpy(labels)
    split = settings["splits"]["validation"]
    is_validation = torch.zeros(len(y), dtype=torch.bool)
    is_validation[slice(split.get("start"), split.get("stop"), split.get("step"))] = True
    return DigitSplits(
        train_images=x[~is_validation],
        train_labels=y[~is_validation],
        validation_images=x[is_validation],
        validation_labels=y[is_validation],
        background=-mean / std,
    )


def _resize(images: NDArray[np.uint8], size: list[int], interpolation: str) -> Tensor:
    """Enlarge (N, H, W, 1) to (N, 1, *size) in [0, 1] with Pillow, whose filters the reader of the manifest uses."""
    height, width = size
    resample = Image.Resampling[interpolation.upper()]
    resized = [np.asarray(Image.fromarray(image[..., 0]).resize((width, height), resample)) for image in images]
    return torch.from_numpy(np.stack(resized)[:, np.newaxis]).float() / 255


def train(images: Tensor, labels: Tensor, *, epochs: int, seed: int, background: float) -> nn.Module:
    """Train a new `digits_cnn` with AdamW and a cosine schedule after one epoch of warm-up.

    Args:
        images: Normalised, (N, 1, 32, 32), float32.
        labels: (N,), int64.
        epochs: Passes over the images, at least 1.
        seed: Of the initial weights, the order and the augmentation.
        background: Pixel value that fills what a shift leaves empty.

    Returns:
        The network in evaluation mode.
    """
    generator = Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):  # PyTorch's initialisers know only the global generator
        torch.manual_seed(seed)
        model = digits_cnn()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=WEIGHT_DECAY)
    steps_per_epoch = -(-len(images) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, PEAK_LEARNING_RATE, total_steps=epochs * steps_per_epoch, pct_start=min(0.5, 1 / epochs)
    )
    model.train()
    for _ in range(epochs):
        for batch in torch.split(torch.randperm(len(images), generator=generator), BATCH_SIZE):
            optimizer.zero_grad()
            scores = model(_augment(images[batch], background, generator))
            loss = F.cross_entropy(scores, labels[batch], label_smoothing=LABEL_SMOOTHING)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    return model.eval()


def _augment(images: Tensor, background: float, generator: Generator) -> Tensor:
    """Turn, scale, slant and shift each image of (N, 1, H, W) a little, at random."""

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator) * 2 - 1

    count = len(images)
    angle = uniform(count) * (MAX_TURN_DEGREES * torch.pi / 180)
    scale = 1 + uniform(count, 2) * MAX_SCALE_CHANGE
    shift = uniform(count, 2) * (2 * MAX_SHIFT_RATIO)  # the grid spans -1 to 1
    cos, sin = angle.cos(), angle.sin()
    rows = [
        torch.stack([cos * scale[:, 0], -sin, shift[:, 0]], dim=1),
        torch.stack([sin, cos * scale[:, 1], shift[:, 1]], dim=1),
    ]
    grid = F.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)
    return F.grid_sample(images - background, grid, align_corners=False) + background


@torch.inference_mode()
def accuracy_ratio(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of `images` (N, 1, 32, 32) whose best class is the label."""
    is_right: Tensor = model(images).argmax(dim=1) == labels
    return is_right.double().mean().item()


def save_weights(model: nn.Module, path: Path) -> None:
    """Write the state_dict to `path` as a whole or not at all; equal weights give equal bytes."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:  # given a path, torch.save would put its name into the bytes
            torch.save(model.state_dict(), file)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def main(arguments: list[str] | None = None) -> None:
    """Train, print the held-out accuracy and save the checkpoint."""
    parser = argparse.ArgumentParser(description="Train the digits network of the quick start.")
    parser.add_argument("--output", type=Path, default=REPOSITORY / "models" / "digits.pt", help="the checkpoint")
    parser.add_argument("--epochs", type=int, default=30, help="passes over the images (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights, order and augmentation (default: %(default)s)")
    options = parser.parse_args(arguments)
    if options.epochs < 1:
        parser.error(f"--epochs must be at least 1, got {options.epochs}")
    if not options.output.parent.is_dir():
        parser.error(f"the folder of --output {options.output} does not exist; create it first")

    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)  # sums over threads could change their order
    data = load_splits(REPOSITORY / "calibration" / "digits.toml")
    model = train(
        data.train_images, data.train_labels, epochs=options.epochs, seed=options.seed, background=data.background
    )
    accuracy = accuracy_ratio(model, data.validation_images, data.validation_labels)
    save_weights(model, options.output)
    print(f"{options.output}: {accuracy:.1%} of {len(data.validation_labels)} held-out digits are right")


if __name__ == "__main__":
    main()
