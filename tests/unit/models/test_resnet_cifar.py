import io
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from sepdeploy.models import resnet_cifar

SHARED = Path(__file__).parents[3].parent / "shared"
CHECKPOINTS = {
    "resnet20-12fca82f.th": "resnet20",
    "resnet20_jpeg.pt": "resnet20",
    "resnet56-4bfd9763.th": "resnet56",
    "resnet56_jpeg.pt": "resnet56",
}
IMAGES = 512

needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="the public checkpoints are not beside the repository")


def load_checkpoint(file_name: str) -> nn.Module:
    content = torch.load(SHARED / "weights" / file_name, map_location="cpu", weights_only=True)
    state = content.get("state_dict", content)
    model: nn.Module = getattr(resnet_cifar, CHECKPOINTS[file_name])()
    model.load_state_dict({name.removeprefix("module."): value for name, value in state.items()})
    return model.eval()


def parameters_of(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def load_test_images(count: int) -> tuple[Tensor, Tensor]:
    with np.load(SHARED / "data" / "cifar10_jpeg_test.npz") as data:
        jpeg, offsets, labels = data["jpeg"], data["offsets"], data["labels"]
    decoded = [
        np.asarray(Image.open(io.BytesIO(jpeg[start:stop].tobytes())).convert("RGB"))
        for start, stop in itertools.pairwise(offsets[: count + 1])
    ]
    pixels = torch.from_numpy(np.stack(decoded)).permute(0, 3, 1, 2) / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (pixels - mean[:, None, None]) / std[:, None, None], torch.from_numpy(labels[:count].astype(np.int64))


@pytest.mark.parametrize(
    ("name", "depth", "params_m"),
    [
        ("resnet20", 20, 0.270),
        ("resnet32", 32, 0.464),
        ("resnet44", 44, 0.659),
        ("resnet56", 56, 0.853),
        ("resnet110", 110, 1.728),
    ],
)
def test_depth_and_parameters_are_those_of_the_paper(name: str, depth: int, params_m: float) -> None:
    model = getattr(resnet_cifar, name)()

    weighted = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert len(weighted) == depth
    assert round(parameters_of(model) / 1e6, 3) == params_m


def test_num_classes_sets_the_outputs_and_odd_images_work() -> None:
    model = resnet_cifar.resnet20(num_classes=7).eval()

    assert model(torch.zeros(2, 3, 33, 35)).shape == (2, 7)


def test_shortcut_is_option_a() -> None:
    block = resnet_cifar.BasicBlock(16, 32, stride=2)
    x = torch.randn(1, 16, 8, 8)

    y = block.shortcut(x)

    assert torch.equal(y[:, 8:24], x[:, :, ::2, ::2])
    assert not y[:, :8].any()
    assert not y[:, 24:].any()
    assert not list(block.shortcut.parameters())


def test_an_odd_number_of_channels_is_padded_whole() -> None:
    block = resnet_cifar.BasicBlock(17, 34, stride=2).eval()

    assert block(torch.randn(1, 17, 8, 8)).shape == (1, 34, 4, 4)


def test_projection_is_a_strided_pointwise_convolution_with_batch_norm() -> None:
    model = resnet_cifar.resnet20(shortcut="projection").eval()
    conv, norm = model.layer2[0].shortcut

    assert (conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride) == (16, 32, (1, 1), (2, 2))
    assert conv.bias is None
    assert isinstance(norm, nn.BatchNorm2d)
    assert isinstance(model.layer1[0].shortcut, nn.Identity)
    assert isinstance(model.layer2[1].shortcut, nn.Identity)
    plain = resnet_cifar.resnet20()
    added = 16 * 32 + 2 * 32 + 32 * 64 + 2 * 64
    assert parameters_of(model) == parameters_of(plain) + added


def test_unknown_shortcut_is_refused() -> None:
    with pytest.raises(ValueError, match="shortcut must be 'pad' or 'projection', got 'B'"):
        resnet_cifar.resnet20(shortcut="B")


@pytest.mark.parametrize(("width", "channels"), [(1.0, [16, 32, 64]), (3.625, [58, 116, 232]), (1.1, [17, 35, 70])])
def test_width_scales_the_three_stages_and_rounds_down(width: float, channels: list[int]) -> None:
    model = resnet_cifar.resnet32(width=width).eval()

    assert [stage[-1].conv2.out_channels for stage in (model.layer1, model.layer2, model.layer3)] == channels
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


def test_imagenet40_features_are_at_16_8_and_4_pixels() -> None:
    model = resnet_cifar.resnet20_imagenet40().eval()
    sizes = []
    for stage in (model.layer1, model.layer2, model.layer3):
        stage.register_forward_hook(lambda _, args, output: sizes.append(tuple(output.shape[1:])))

    scores = model(torch.zeros(1, 3, 32, 32))

    assert sizes == [(64, 16, 16), (128, 8, 8), (256, 4, 4)]
    assert scores.shape == (1, 1000)


def test_it_exports_with_the_same_outputs() -> None:
    model = resnet_cifar.resnet20().eval()
    x = torch.randn(1, 3, 32, 32)

    exported = torch.export.export(model, (x,)).module()

    torch.testing.assert_close(exported(x), model(x))


@needs_shared
@pytest.mark.parametrize("file_name", CHECKPOINTS)
def test_public_checkpoints_load_strictly(file_name: str) -> None:
    assert all(parameter.isfinite().all() for parameter in load_checkpoint(file_name).parameters())


@needs_shared
@pytest.mark.parametrize(("file_name", "least_ratio"), [("resnet20_jpeg.pt", 0.86), ("resnet56_jpeg.pt", 0.88)])
def test_public_checkpoints_are_as_accurate_as_published(file_name: str, least_ratio: float) -> None:
    model = load_checkpoint(file_name)
    images, labels = load_test_images(IMAGES)

    with torch.inference_mode():
        is_right = model(images).argmax(dim=1) == labels

    assert is_right.double().mean().item() >= least_ratio
