"""Small networks with checkpoints and images, as a user would have them."""

import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

import sepdeploy
from sepdeploy.core.artifact import Format
from sepdeploy.loading.arch import build_architecture

NETWORKS = textwrap.dedent(
    """
    import torch
    import torch.nn.functional as F
    from torch import nn

    def block(inputs, outputs, stride=1):
        return nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
        )

    class Classifier(nn.Module):
        def __init__(self, num_classes=4, channels=3):
            super().__init__()
            self.features = nn.Sequential(block(channels, 16), block(16, 32, 2), block(32, 32), block(32, 32))
            self.linear = nn.Linear(32, num_classes)

        def forward(self, x):
            return self.linear(self.features(x).mean((2, 3)))

    class Flattened(nn.Module):
        def __init__(self):
            super().__init__()
            self.features = nn.Sequential(block(3, 16, 2), block(16, 32, 2))
            self.linear = nn.Linear(32 * 16, 4)

        def forward(self, x):
            x = self.features(x)
            return self.linear(x.view(x.size(0), -1))

    class TwoOutputs(Classifier):
        def forward(self, x):
            maps = self.features(x)
            return {"scores": self.linear(maps.mean((2, 3))), "maps": maps}

    class Segmenter(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 16, 1)  # reads the image without a neighbourhood
            self.features = nn.Sequential(block(16, 32, 2), block(32, 32))
            self.head = nn.Conv2d(32, 5, 1)

        def forward(self, x):
            y = self.head(self.features(self.stem(x)))
            return F.interpolate(y, scale_factor=2, mode="bilinear", align_corners=False)

    class ChannelsLast(Classifier):
        def forward(self, x):
            return super().forward(x.permute(0, 3, 1, 2))

    class InPlace(Classifier):
        def forward(self, x):
            return super().forward(x.sub_(0.5).mul_(2))

    class AllPointwise(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 1)
            self.linear = nn.Linear(8, 4)

        def forward(self, x):
            return self.linear(self.conv(x).mean((2, 3)))

    class ReturnsNan(Classifier):
        def forward(self, x):
            return super().forward(x) * float("nan")

    class Dynamic(Classifier):
        def forward(self, x):
            y = super().forward(x)
            return y * 2 if y.sum() > 1e9 else y

    class SingleImages(Classifier):
        def forward(self, x):
            return self.linear(self.features(x).mean((2, 3)).reshape(1, -1))

    class MixesImages(Classifier):
        def forward(self, x):
            return super().forward(x).mean(0, keepdim=True)

    class Outlier(Classifier):
        # One value of 300 among the features: their common int8 scale leaves nothing of the others.
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(33, 4)

        def forward(self, x):
            x = self.features(x).mean((2, 3))
            scores = self.linear(torch.cat([x, torch.full_like(x[:, :1], 300.0)], 1))
            return scores - 300 * self.linear.weight[:, 32]

    def regressor():
        return Classifier(num_classes=1)

    def grey():
        return InPlace(channels=1)
    """
)


class Workplace:
    """A folder with `nets.py`; checkpoints and images are made when they are asked for."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "nets.py").write_text(NETWORKS)

    def arch(self, name: str) -> str:
        return f"{self.folder / 'nets.py'}:{name}"

    def network(self, name: str) -> torch.nn.Module:
        torch.manual_seed(0)
        network = build_architecture(self.arch(name)).module.eval()
        for module in network.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
        return network

    def checkpoint(self, name: str, dtype: torch.dtype = torch.float32) -> Path:
        path = self.folder / f"{name}_{str(dtype).removeprefix('torch.')}.pt"
        if not path.exists():
            torch.save(self.network(name).to(dtype).state_dict(), path)
        return path

    def images(
        self, *, count: int = 128, channels: int = 3, labels: str | None = None, weights: Path | None = None
    ) -> str:
        """Smooth random images, 16x16; labels are what the network `labels` says of them, with other weights if any."""
        path = self.folder / f"images_{count}_{channels}_{labels}{weights.stem if weights else ''}.npz"
        if not path.exists():
            rng = np.random.default_rng(0)
            coarse = torch.from_numpy(rng.uniform(0, 255, (count, channels, 4, 4)))
            pixels = torch.nn.functional.interpolate(coarse, (16, 16), mode="bicubic").clamp(0, 255).byte()
            arrays = {"images": pixels.permute(0, 2, 3, 1).numpy()}
            if labels is not None:
                network = self.network(labels)
                if weights is not None:
                    network.load_state_dict(torch.load(weights))
                with torch.no_grad():
                    arrays["labels"] = network(pixels.float() / 255).argmax(1).numpy()
            np.savez(path, **arrays)
        return str(path)

    def trained(self, name: str = "Classifier") -> Path:
        """A checkpoint with the statistics of the images, and outputs that say something."""
        path = self.folder / f"trained_{name}.pt"
        if not path.exists():
            network = self.network(name).train()
            with np.load(self.images()) as arrays, torch.no_grad():
                x = torch.from_numpy(arrays["images"]).permute(0, 3, 1, 2).float() / 255
                for _ in range(60):
                    network(x)
                network.linear.weight[:, :32] *= 20
            torch.save(network.state_dict(), path)
        return path

    def options(self, name: str, **changes) -> sepdeploy.ConvertOptions:
        defaults = {
            "model": self.checkpoint(name),
            "arch": self.arch(name),
            "calibration": changes.pop("calibration", None) or self.images(),
            "scheme": "depthwise_separable",
            "formats": (Format.ONNX,),
            "bench_seconds": 0.02,
            "reconstruct": None,
            "output": self.folder / f"{name}.sepdeploy",
        }
        return sepdeploy.ConvertOptions(**{**defaults, **changes})


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    return Workplace(tmp_path_factory.mktemp("work"))
