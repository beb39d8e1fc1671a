"""Random changes of training images, on batches that are normalized already, and which of them a network tolerates."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F  # noqa: N812 (PyTorch's own convention)
from torch import Tensor, nn

from sepdeploy.analyze.damage import are_class_scores
from sepdeploy.analyze.trace import output_tensors
from sepdeploy.core.training import AugmentName

__all__ = ["Augmenter", "tolerated_augmentations"]

_DRAWS = 8
"""Random numbers per image, one for each thing that can happen, so that no augmentation changes another's."""

_SHIFT_RATIO = 1 / 8
_ZOOM = 1.25
_CONTRAST = 0.2
_BRIGHTNESS = 0.2  # in standard deviations of the image

_TOLERATED = 0.8
"""Share of images that keep their class, or of the outputs' variance that is kept, above which a change is harmless."""


class Augmenter:
    """Changes each image of a batch in its own way.

    'flip' mirrors it; 'shift' moves it by whole pixels, up to an eighth of its side; 'zoom' enlarges a part of 1/1.25
    to 1 of its sides, found anywhere, bilinearly; what comes in at the edges is mirrored. 'color' scales the distance
    of the values from their mean by 0.8 to 1.2 and adds up to 0.2 of their standard deviation.

    Args:
        names: What is done; nothing returns the batch itself.
        layout: Of the batches: 'NCHW' is (N, C, H, W), 'NHWC' is (N, H, W, C).

    Example:
        >>> augmenter = Augmenter(("flip", "shift"), "NCHW")
        >>> augmenter(torch.zeros(2, 3, 8, 8), torch.Generator().manual_seed(0)).shape
        torch.Size([2, 3, 8, 8])
    """

    def __init__(self, names: tuple[AugmentName, ...], layout: Literal["NCHW", "NHWC"]) -> None:
        self.names = names
        self.layout = layout

    def __call__(self, batch: Tensor, generator: torch.Generator) -> Tensor:
        """A batch of the same shape and type; `batch` is not changed.

        Args:
            batch: Images, on any device.
            generator: On the CPU. Equal states give equal changes, on every device and whatever the names are.
        """
        return self.apply(batch, self.draw(len(batch), generator))

    def draw(self, count: int, generator: torch.Generator) -> Tensor:
        """Random numbers for `count` images, a row for each: a process may draw for all, and keep those of its own."""
        return torch.rand(count, _DRAWS, generator=generator)

    def apply(self, batch: Tensor, draws: Tensor) -> Tensor:
        """The batch, each image changed by what its row of `draws` says."""
        if not self.names or not len(batch):
            return batch
        images = batch.permute(0, 3, 1, 2) if self.layout == "NHWC" else batch
        flip, move_x, move_y, scale, zoom_x, zoom_y, contrast, brightness = draws.to(batch).unbind(1)
        if "flip" in self.names:
            images = torch.where((flip < 0.5)[:, None, None, None], images.flip(3), images)
        if "shift" in self.names or "zoom" in self.names:
            moves = (move_x, move_y) if "shift" in self.names else None
            zooms = (scale, zoom_x, zoom_y) if "zoom" in self.names else None
            images = _resample(images, moves, zooms)
        if "color" in self.names:
            images = _recolor(images, contrast, brightness)
        return images.permute(0, 2, 3, 1).contiguous() if self.layout == "NHWC" else images


def _resample(
    images: Tensor, moves: tuple[Tensor, Tensor] | None, zooms: tuple[Tensor, Tensor, Tensor] | None
) -> Tensor:
    """Move and enlarge (N, C, H, W) in one bilinear interpolation; draws are (N,) in [0, 1).

    Coordinates are those of `grid_sample`: -1 and 1 are the outer edges of an image.
    """
    height, width = images.shape[2:]
    ratio = torch.ones_like(images[:, 0, 0, 0])
    offsets = [torch.zeros_like(ratio), torch.zeros_like(ratio)]  # x, y
    if zooms is not None:
        ratio = 1 - zooms[0] * (1 - 1 / _ZOOM)
        offsets = [(2 * place - 1) * (1 - ratio) for place in zooms[1:]]
    if moves is not None:
        for axis, (side, draw) in enumerate(zip((width, height), moves, strict=True)):
            most = int(side * _SHIFT_RATIO)
            pixels = torch.floor(draw * (2 * most + 1)) - most
            offsets[axis] = offsets[axis] + pixels * (2 / side)
    zero = torch.zeros_like(ratio)
    rows = [torch.stack([ratio, zero, offsets[0]], 1), torch.stack([zero, ratio, offsets[1]], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="reflection", align_corners=False)


def _recolor(images: Tensor, contrast: Tensor, brightness: Tensor) -> Tensor:
    """Scale the values of (N, C, H, W) about their mean, and shift them; draws are (N,) in [0, 1)."""
    mean = images.mean((1, 2, 3), keepdim=True)
    deviation = images.std((1, 2, 3), correction=0, keepdim=True)
    factor, shift = ((2 * draw - 1)[:, None, None, None] for draw in (contrast, brightness))
    return mean + (images - mean) * (1 + _CONTRAST * factor) + _BRIGHTNESS * shift * deviation


@torch.no_grad()
def tolerated_augmentations(
    original: nn.Module, batches: Iterable[Tensor], layout: Literal["NCHW", "NHWC"]
) -> tuple[AugmentName, ...]:
    """The augmentations under which the outputs of the trained network stay what they are.

    Whatever is done to an image, the original says what the right outputs for it are; but images unlike those that it
    was trained on teach nothing: mirrored photographs are photographs, mirrored digits are no digits. An augmentation
    is tolerated if the largest class score stays the same for 80% of the images, or, for other outputs, if the squared
    change is at most 20% of the outputs' variance. Outputs of rank 3 and more have positions, which move along with
    the picture: of those, the values of each image are compared in sorted order.

    Args:
        original: The trained network in eval mode.
        batches: Some images that it was trained for, on the device of its weights.
        layout: Of the images.

    Returns:
        Names in the order of `AugmentName`; equal inputs give equal names.
    """
    names: tuple[AugmentName, ...] = get_args(AugmentName)
    kept = dict.fromkeys(names, 0.0)
    whole = 0.0
    generator = torch.Generator().manual_seed(0)
    for batch in batches:
        before = output_tensors(original(batch.clone()))
        whole += _difference(before, None)
        for name in names:
            changed = Augmenter((name,), layout)(batch, generator)
            kept[name] += _difference(before, output_tensors(original(changed.clone())))
    return tuple(name for name in names if kept[name] <= (1 - _TOLERATED) * whole)


def _difference(before: Sequence[Tensor], after: Sequence[Tensor] | None) -> float:
    """Images of another class, or the squared change of the outputs; without `after` the most that it can be."""
    if are_class_scores(before):
        if after is None:
            return float(len(before[0]))
        return float((before[0].argmax(1) != after[0].argmax(1)).sum())
    total = 0.0
    for index, tensor in enumerate(before):
        if not tensor.is_floating_point():
            continue
        values = _comparable(tensor)
        # Of rank 2 each output has a mean of its own; sorted values have one together.
        mean = values.mean() if tensor.dim() > 2 else values.mean(0)
        other = mean if after is None else _comparable(after[index])
        total += float((values - other).square().sum())
    return total


def _comparable(output: Tensor) -> Tensor:
    """(N, ...) as (N, values) in float64; sorted where they have positions."""
    values = output.cpu().double()  # on the CPU first: not every device has float64
    values = values.flatten(1) if values.dim() > 1 else values[:, None]
    return values.sort(1).values if output.dim() > 2 else values
