"""A small network for scikit-learn's handwritten digits, and those digits as images.

The digits (Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", UCI, 1998) come with scikit-learn, so the
quick start needs no download. They are 8x8 pixels; the network sees them enlarged to 32x32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F  # noqa: N812  the name that PyTorch users know
from torch import Tensor, nn

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["DigitsCNN", "digits_cnn", "load_images"]


class DigitsCNN(nn.Module):
    """Five 3x3 convolutions with batch norm, global average pooling and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            _conv_block(1, 32, stride=1),
            _conv_block(32, 64, stride=2),
            _conv_block(64, 64, stride=1),
            _conv_block(64, 96, stride=2),
            _conv_block(96, 96, stride=1),
        )
        self.linear = nn.Linear(96, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Class scores (N, 10) of normalised grey images (N, 1, 32, 32)."""
        x = F.adaptive_avg_pool2d(self.features(x), 1).flatten(1)
        scores: Tensor = self.linear(x)
        return scores


def _conv_block(in_channels: int, out_channels: int, *, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(),
    )


def digits_cnn() -> DigitsCNN:
    """The network of the quick start: 0.20 M parameters, 23 MMACs, trained weights in `models/digits.pt`."""
    return DigitsCNN()


def load_images() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """All 1797 digits in scikit-learn's order, in which each writer's digits follow each other.

    Returns:
        images: (1797, 8, 8, 1), ink is bright; the data set's values 0..16 are stretched to 0..255.
        labels: (1797,), the digits 0..9.
    """
    import numpy as np
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., np.newaxis]
    return images, digits.target.astype(np.int64)
