"""Trains the MobileNetV2 of `int8.py` on small photographs, resumably, on a CPU.

python tests/benchmarks/train_mobilenet.py ../shared mobilenet_v2.pt --epochs 30 --threads 1

Labels alone, random crops and mirroring, SGD with a one-cycle rate. After each epoch everything that training goes on
from is written beside the checkpoint, as CHECKPOINT.state; started again, it goes on there. The checkpoint itself, a
state_dict, is written after each epoch too, so that an unfinished one can be used; its accuracy on the 10,000 test
images is printed, which decides nothing.

The network is `models.mobilenet:mobilenet_v2(num_classes=10,width=0.5,stem_stride=1)`: with the usual stride of its
stem, images of 32x32 end as a single pixel two stages too early. Needs the folder with data/cifar10_jpeg_*.npz.
"""

import argparse
import io
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from PIL import Image

from sepdeploy.core.files import replacing
from sepdeploy.models.mobilenet import mobilenet_v2

BATCH_SIZE = 128
PEAK_RATE = 0.1
WEIGHT_DECAY = 2e-4
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # calibration/cifar10.toml


def read_images(source: Path, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels (N, 3, 32, 32) uint8 and labels (N,)."""
    with np.load(source / "data" / f"cifar10_jpeg_{name}.npz") as arrays:
        data, offsets, labels = arrays["jpeg"], arrays["offsets"], arrays["labels"]
        files = [data[offsets[i] : offsets[i + 1]].tobytes() for i in range(len(labels))]
    pixels = np.stack([np.asarray(Image.open(io.BytesIO(file)).convert("RGB")) for file in files])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(labels.astype(np.int64))


def normalized(pixels: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return ((pixels.float() / 255 - mean) / std).contiguous(memory_format=torch.channels_last)


def augmented(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Each image mirrored or not, and moved by up to four pixels."""
    padded = F.pad(pixels, (4, 4, 4, 4))
    rows, columns = torch.randint(0, 9, (2, len(pixels)), generator=generator).tolist()
    mirrored = (torch.rand(len(pixels), generator=generator) < 0.5).tolist()
    images = [padded[i, :, r : r + 32, c : c + 32] for i, (r, c) in enumerate(zip(rows, columns, strict=True))]
    return torch.stack([image.flip(-1) if m else image for image, m in zip(images, mirrored, strict=True)])


@torch.inference_mode()
def accuracy(network: torch.nn.Module, pixels: torch.Tensor, labels: torch.Tensor) -> float:
    network.eval()
    pairs = zip(pixels.split(256), labels.split(256), strict=True)
    right = sum(int((network(normalized(x)).argmax(1) == y).sum()) for x, y in pairs)
    return right / len(labels)


class Training:
    """The network with all that training goes on from."""

    def __init__(self, arguments, steps_per_epoch: int) -> None:
        torch.manual_seed(arguments.seed)
        self.network = mobilenet_v2(10, width=arguments.width, stem_stride=1).to(memory_format=torch.channels_last)
        self.optimizer = torch.optim.SGD(
            self.network.parameters(), PEAK_RATE, momentum=0.9, nesterov=True, weight_decay=WEIGHT_DECAY
        )
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, PEAK_RATE, total_steps=arguments.epochs * steps_per_epoch, pct_start=0.2
        )
        self.epoch = 0
        self.key = [arguments.epochs, arguments.width, arguments.seed, steps_per_epoch]

    def parts(self):
        return {"network": self.network, "optimizer": self.optimizer, "schedule": self.schedule}

    def save(self, path: Path) -> None:
        state = {name: part.state_dict() for name, part in self.parts().items()}
        with replacing(path) as temporary:
            torch.save({**state, "epoch": self.epoch, "key": self.key}, temporary)

    def restore(self, path: Path) -> None:
        if not path.exists():
            return
        state = torch.load(path, weights_only=True)
        if state["key"] != self.key:
            raise SystemExit(f"{path} is from a training with other options; remove it to start anew")
        for name, part in self.parts().items():
            part.load_state_dict(state[name])
        self.epoch = state["epoch"]

    def train_epoch(self, pixels: torch.Tensor, labels: torch.Tensor, seed: int) -> float:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + self.epoch)
        torch.manual_seed(seed * 1_000_003 + self.epoch)  # dropout's
        self.network.train()
        total = 0.0
        order = torch.randperm(len(pixels), generator=generator)
        batches = order[: len(order) // BATCH_SIZE * BATCH_SIZE].split(BATCH_SIZE)
        for batch in batches:
            scores = self.network(normalized(augmented(pixels[batch], generator)))
            loss = F.cross_entropy(scores, labels[batch], label_smoothing=0.05)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.schedule.step()
            total += float(loss.detach())
        self.epoch += 1
        return total / len(batches)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="the folder with data/")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--width", type=float, default=0.5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, help="only so many training images, to try it out")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    pixels, labels = (values[: arguments.images] for values in read_images(arguments.source, "train"))
    test = read_images(arguments.source, "test")
    training = Training(arguments, len(pixels) // BATCH_SIZE)
    state = arguments.checkpoint.with_name(f"{arguments.checkpoint.name}.state")
    training.restore(state)
    while training.epoch < arguments.epochs:
        began = time.monotonic()
        loss = training.train_epoch(pixels, labels, arguments.seed)
        training.save(state)
        with replacing(arguments.checkpoint) as temporary:
            torch.save(training.network.state_dict(), temporary)
        right = accuracy(training.network, *test)
        seconds = time.monotonic() - began
        print(f"epoch {training.epoch}: loss {loss:.4f}, test accuracy {right:.4f}, {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
