"""Small networks that together have what exporters stumble over."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn


class Classifier(nn.Module):
    """Batch norm, ReLU, a grouped convolution, a residual addition, a stride, global pooling, a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.branch = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=4, bias=False), nn.BatchNorm2d(8))
        self.down = nn.Conv2d(8, 16, 3, stride=2, padding=1)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.relu(x + self.branch(x))
        x = torch.relu(self.down(x))
        return self.head(x.mean((2, 3)))


class NestedOutputs(nn.Module):
    """A dictionary whose keys are not sorted, with a tuple and a None inside; one output is 4-D."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> dict[str, object]:
        x = self.conv(x)
        return {"scores": self.head(x.mean((2, 3))), "extra": (None, x), "aux": x.amax((2, 3))}


class DenseMap(nn.Module):
    """A 4-D output that is not square."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, (3, 1), dilation=2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(self.conv(x))


class DataDependent(nn.Module):
    """Takes a different path for different pixels."""

    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


def randomized(model: nn.Module) -> nn.Module:
    """Batch norms as after training: statistics and scales that are not 0 and 1."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor in (module.running_mean, module.bias):
                nn.init.normal_(tensor, std=0.3)
            for tensor in (module.running_var, module.weight):
                nn.init.uniform_(tensor, 0.5, 2.0)
    return model


@pytest.fixture(scope="session")
def classifier() -> nn.Module:
    torch.manual_seed(0)
    return randomized(Classifier()).eval()


@pytest.fixture(scope="session")
def nested_outputs() -> nn.Module:
    torch.manual_seed(1)
    return NestedOutputs().eval()


@pytest.fixture(scope="session")
def dense_map() -> nn.Module:
    torch.manual_seed(2)
    return DenseMap().eval()


@pytest.fixture(scope="session")
def data_dependent() -> nn.Module:
    return DataDependent().eval()


@pytest.fixture(scope="session")
def images() -> Tensor:
    return torch.randn(3, 3, 12, 10, generator=torch.Generator().manual_seed(3))
