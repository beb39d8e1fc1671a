import pytest
import torch
from torch import nn

from sepdeploy.train.augment import Augmenter, tolerated_augmentations

NAMES = ("flip", "shift", "zoom", "color")


def images(count=6, side=16, channels=3):
    """Smooth pictures, each another."""
    torch.manual_seed(0)
    return nn.functional.interpolate(torch.randn(count, channels, 4, 4), side, mode="bicubic")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_nothing_is_the_batch_itself():
    batch = images()
    assert Augmenter((), "NCHW")(batch, seeded()) is batch


@pytest.mark.parametrize("name", NAMES)
def test_images_change_each_in_its_own_way_and_the_batch_stays(name):
    batch = images(1).expand(20, -1, -1, -1).clone()
    before = batch.clone()
    changed = Augmenter((name,), "NCHW")(batch, seeded())
    assert torch.equal(batch, before)
    assert changed.shape == batch.shape
    assert changed.dtype == batch.dtype
    kinds = {tuple(image.flatten().tolist()) for image in changed}
    assert len(kinds) == 2 if name == "flip" else len(kinds) > 8
    assert torch.equal(Augmenter((name,), "NCHW")(batch, seeded()), changed)
    assert not torch.equal(Augmenter((name,), "NCHW")(batch, seeded(1)), changed)


def test_flip_mirrors_about_half_of_the_images():
    batch = images(200)
    changed = Augmenter(("flip",), "NCHW")(batch, seeded())
    mirrored = [torch.equal(new, old.flip(2)) for new, old in zip(changed, batch, strict=True)]
    assert all(is_mirrored or torch.equal(changed[i], batch[i]) for i, is_mirrored in enumerate(mirrored))
    assert 70 < sum(mirrored) < 130


def test_shift_moves_by_whole_pixels_and_mirrors_what_comes_in():
    batch = images(40)
    changed = Augmenter(("shift",), "NCHW")(batch, seeded())
    doubled = torch.cat([batch.flip(3), batch, batch.flip(3)], 3)
    doubled = torch.cat([doubled.flip(2), doubled, doubled.flip(2)], 2)
    found = set()
    for image, wide in zip(changed, doubled, strict=True):
        places = [
            (y, x)
            for y in range(-2, 3)
            for x in range(-2, 3)
            if torch.allclose(image, wide[:, 16 + y : 32 + y, 16 + x : 32 + x], atol=1e-5)
        ]
        assert len(places) == 1
        found.update(places)
    assert {y for y, _ in found} == {x for _, x in found} == {-2, -1, 0, 1, 2}


def test_zoom_shows_a_part_of_the_image():
    ramp = torch.linspace(0, 1, 40).expand(100, 1, 40, 40).clone()
    changed = Augmenter(("zoom",), "NCHW")(ramp, seeded())
    spans = changed[:, 0, 20].amax(1) - changed[:, 0, 20].amin(1)
    assert (spans > 0.78).all()
    assert (spans < 1.001).all()
    assert spans.std() > 0.03
    assert (changed.diff(dim=3) >= -1e-6).all()


def test_color_keeps_the_picture():
    batch = images()
    changed = Augmenter(("color",), "NCHW")(batch, seeded())
    for new, old in zip(changed.flatten(1), batch.flatten(1), strict=True):
        assert torch.corrcoef(torch.stack([new, old]))[0, 1] > 0.9999
        assert 0.79 < new.std() / old.std() < 1.21
        assert abs(new.mean() - old.mean()) < 0.21 * old.std()


@pytest.mark.parametrize("names", [*((name,) for name in NAMES), NAMES])
def test_layouts_agree(names):
    batch = images()
    one = Augmenter(names, "NCHW")(batch, seeded())
    other = Augmenter(names, "NHWC")(batch.permute(0, 2, 3, 1).contiguous(), seeded())
    assert other.is_contiguous()
    torch.testing.assert_close(one, other.permute(0, 3, 1, 2))


@pytest.mark.parametrize("shape", [(0, 3, 8, 8), (1, 1, 1, 1), (2, 3, 1, 4), (2, 1, 2, 2), (3, 3, 4, 3)])
def test_tiny_images_survive(shape):
    batch = torch.rand(shape)
    changed = Augmenter(NAMES, "NCHW")(batch, seeded())
    assert changed.shape == shape
    assert torch.isfinite(changed).all()


def test_constant_images_stay_constant():
    batch = torch.full((4, 3, 8, 8), 0.7)
    torch.testing.assert_close(Augmenter(NAMES, "NCHW")(batch, seeded()), batch)


def test_parts_of_a_batch_are_changed_as_the_whole_is():
    batch = images(6)
    augmenter = Augmenter(NAMES, "NCHW")
    draws = augmenter.draw(6, seeded())
    whole = augmenter(batch, seeded())
    parts = [augmenter.apply(batch[part], draws[part]) for part in (slice(0, 2), slice(2, 6))]
    torch.testing.assert_close(torch.cat(parts), whole)


class Pooled(nn.Module):
    """Outputs that only the mean over the image decides, or its left half."""

    def __init__(self, classes=4, *, half=False, positions=False):
        super().__init__()
        torch.manual_seed(1)
        self.linear, self.half, self.positions = nn.Linear(3, classes, bias=False), half, positions

    def forward(self, x):
        x = x[..., : x.shape[3] // 2] if self.half else x
        if self.positions:
            return self.linear(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.linear(x.mean((2, 3)))


def test_a_network_that_sees_sides_does_not_tolerate_the_mirror():
    batches = [images(64)]
    assert "flip" in tolerated_augmentations(Pooled(), batches, "NCHW")
    sided = tolerated_augmentations(Pooled(half=True), batches, "NCHW")
    assert "flip" not in sided
    assert "color" in sided
    assert sided == tolerated_augmentations(Pooled(half=True), batches, "NCHW")


def test_regression_is_judged_by_its_variance():
    class One(nn.Module):
        def __init__(self, half):
            super().__init__()
            self.inner = Pooled(1, half=half)

        def forward(self, x):
            return {"far": 1000 + self.inner(x), "count": torch.ones(len(x), dtype=torch.int64)}

    batches = [images(64), images(64) + 0.1]
    assert "flip" in tolerated_augmentations(One(False), batches, "NCHW")
    assert "flip" not in tolerated_augmentations(One(True), batches, "NCHW")


def test_maps_may_move_with_the_picture():
    assert {"flip", "shift"} <= set(tolerated_augmentations(Pooled(positions=True), [images(16)], "NCHW"))


def test_channels_last_networks_are_asked_in_their_layout():
    class Last(nn.Module):
        def forward(self, x):
            assert x.shape[3] == 3
            return x.mean((1, 2))

    batches = [images(32).permute(0, 2, 3, 1).contiguous()]
    assert "flip" in tolerated_augmentations(Last(), batches, "NHWC")


class WithoutFloat64(torch.Tensor):
    """As on a device that has no float64."""

    def double(self):
        raise TypeError("no float64 here")

    def cpu(self):
        return self.as_subclass(torch.Tensor)


def test_devices_without_float64_will_do():
    class Elsewhere(Pooled):
        def forward(self, x):
            return super().forward(x)[:, :1].as_subclass(WithoutFloat64)

    assert tolerated_augmentations(Elsewhere(), [images(8)], "NCHW") == tolerated_augmentations(
        lambda x: Elsewhere()(x).cpu(), [images(8)], "NCHW"
    )
