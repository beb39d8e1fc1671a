import copy

import numpy as np
import pytest
import torch
from torch import nn

from sepdeploy.analyze.blocks import Block
from sepdeploy.analyze.damage import network_damage
from sepdeploy.core.passing_errors import is_out_of_memory
from sepdeploy.core.progress import Silent
from sepdeploy.core.training import ReconstructOptions
from sepdeploy.data.images import open_images
from sepdeploy.data.preprocess import Preprocess
from sepdeploy.errors import UnsupportedModelError
from sepdeploy.train import reconstruct as module
from sepdeploy.train.reconstruct import reconstruct

OPTIONS = ReconstructOptions(block_steps=12, network_steps=8, batch_size=16, learning_rate=5e-3, augment=("flip",))
BLOCKS = (Block("first", ("first.0",)), Block("second", ("second.0",)))


def unit(inputs, outputs):
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True))


class Classifier(nn.Module):
    def __init__(self, outputs=4):
        super().__init__()
        self.first, self.second, self.linear = unit(3, 8), unit(8, 8), nn.Linear(8, outputs)

    def forward(self, x):
        return self.linear(self.second(self.first(x)).mean((2, 3)))


class Several(Classifier):
    def forward(self, x):
        maps = self.second(self.first(x.mul_(0.9)))
        return {"boxes": [self.linear(maps.flatten(2).mT), None], "map": maps, "count": torch.tensor([len(x)])}


class Undifferentiable(Classifier):
    """Works in place on what gradients need."""

    def forward(self, x):
        y = torch.sigmoid(self.first(x))
        y.mul_(2)
        return self.linear(self.second(y).mean((2, 3)))


class Detached(Classifier):
    def forward(self, x):
        return self.linear(self.second(self.first(x).detach()).mean((2, 3)).detach())


def networks(kind=Classifier, noise=0.3):
    """A teacher, and a student whose convolutions are wrong."""
    torch.manual_seed(0)
    teacher = kind().eval()
    for norm in (teacher.first[1], teacher.second[1]):
        norm.running_mean.normal_(std=0.1)
        norm.running_var.uniform_(0.5, 2)
    nn.init.normal_(teacher.linear.weight)
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        for conv in (student.first[0], student.second[0]):
            conv.weight += noise * torch.randn_like(conv.weight) * conv.weight.std()
    return student, teacher


@pytest.fixture
def images(tmp_path):
    """`images(64)` gives that many images to train on, and 24 others."""

    def make(count):
        pixels = np.random.default_rng(0).integers(0, 256, (count + 24, 8, 8, 3), dtype=np.uint8)
        np.savez(tmp_path / f"{count}.npz", images=pixels)
        preprocess = Preprocess(mean=(0.5,), std=(0.25,))
        images = open_images(str(tmp_path / f"{count}.npz"), role="calibration", preprocess=preprocess)
        return images.split(count / (count + 24), 0)

    return make


class Killed(BaseException):
    pass


class Stages(Silent):
    """Remembers the stages, and ends the run at one of the steps."""

    def __init__(self, last_step=None):
        self.texts = []
        self.steps = 0
        self.last_step = last_step

    def stage(self, text):
        self.texts.append(text)

    def step(self, done, total):
        self.steps += 1
        if self.steps == self.last_step:
            raise Killed


def run(student, teacher, data, options=OPTIONS, blocks=BLOCKS, checkpoint=None, progress=None):
    return reconstruct(student, teacher, blocks, *data, options, checkpoint=checkpoint, progress=progress or Silent())


def equal(first, second):
    states = (network.state_dict() for network in (first, second))
    return all(torch.equal(a, b) for a, b in zip(*(state.values() for state in states), strict=True))


def outputs_error(network, teacher, data):
    batch = torch.from_numpy(next(data[1].batches(24))[0])
    with torch.no_grad():
        target = teacher.second(teacher.first(batch))
        return float((network.second(network.first(batch)) - target).square().sum() / target.square().sum())


def test_blocks_learn_to_do_what_the_originals_do(images):
    data = images(64)
    student, teacher = networks()
    student.first[0].bias.requires_grad_(False)
    before = copy.deepcopy(student), copy.deepcopy(teacher)
    progress = Stages()
    network, step = run(student, teacher, data, progress=progress)
    assert outputs_error(network, teacher, data) < 0.5 * outputs_error(student, teacher, data)
    assert step.is_kept
    assert step.damage_after < 0.5 * step.damage_before
    assert step.images == 24
    assert step.name == "reconstruction"
    assert step.detail.startswith("2 blocks of 12 steps, 8 of all together; 16 of 64 images a step; augmentation: flip")
    assert progress.texts == [
        f"reconstruction: {text}" for text in ("block 1 of 2, up to first", "block 2 of 2, up to second", "all blocks")
    ]
    assert progress.steps == 12 + 12 + 8
    # What is not in a block, is frozen or is a statistic stays; the networks given stay, too.
    changed = {k for k, value in network.state_dict().items() if not torch.equal(value, student.state_dict()[k])}
    trained = {
        f"{unit}.{name}" for unit in ("first", "second") for name in ("0.weight", "0.bias", "1.weight", "1.bias")
    }
    assert changed == trained - {"first.0.bias"}
    assert equal(student, before[0])
    assert equal(teacher, before[1])
    assert all(weight.grad is None for net in (network, student, teacher) for weight in net.parameters())
    assert not any(part._forward_hooks for net in (network, student, teacher) for part in net.modules())
    assert [n for n, weight in network.named_parameters() if not weight.requires_grad] == ["first.0.bias"]
    assert not network.training


def test_a_block_alone_repairs_what_the_block_before_it_left(images):
    data = images(64)
    student, teacher = networks()
    options = ReconstructOptions(block_steps=12, network_steps=0, batch_size=16, learning_rate=5e-3, augment=())
    network, step = run(student, teacher, data, options, blocks=BLOCKS[1:])
    # The only block begins at the image: its weights are all that its end depends on.
    assert not torch.equal(network.first[0].weight, student.first[0].weight)
    assert step.is_kept
    frozen, _ = networks()
    frozen.first.requires_grad_(False)
    network, step = run(frozen, teacher, data, options, blocks=BLOCKS[1:])
    assert torch.equal(network.first[0].weight, student.first[0].weight)
    assert outputs_error(network, teacher, data) < outputs_error(student, teacher, data)


def test_the_result_is_the_same_for_the_same_seed_and_another_for_another(images):
    data = images(64)
    first, _ = run(*networks(), data)
    second, _ = run(*networks(), data)
    assert equal(first, second)
    other, _ = run(*networks(), data, ReconstructOptions(12, 8, 16, 5e-3, ("flip",), seed=2**40))
    assert not equal(first, other)


@pytest.mark.parametrize(("last_step", "saved_step"), [(3, 0), (5, 3), (14, 12), (19, 18), (29, 27)])
def test_a_killed_run_goes_on_to_the_same_result(images, tmp_path, monkeypatch, last_step, saved_step):
    monkeypatch.setattr(module, "_STEPS_PER_LOOK", 3)
    data, path = images(64), tmp_path / "run" / "reconstruction.pt"
    whole, whole_step = run(*networks(), data)
    with pytest.raises(Killed):
        run(*networks(), data, checkpoint=path, progress=Stages(last_step))
    progress = Stages()
    network, step = run(*networks(), data, checkpoint=path, progress=progress)
    assert equal(network, whole)
    assert step == whole_step
    assert progress.steps == 32 - saved_step
    assert len(progress.texts) == 3 - saved_step // 12
    # A finished run is not repeated, and its file is left for the caller to remove.
    progress = Stages()
    network, step = run(*networks(), data, checkpoint=path, progress=progress)
    assert equal(network, whole)
    assert step == whole_step
    assert progress.texts == []


def test_a_checkpoint_of_another_run_or_a_broken_one_is_not_used(images, tmp_path):
    data, path = images(64), tmp_path / "reconstruction.pt"
    whole, _ = run(*networks(), data)
    run(*networks(noise=0.2), data, checkpoint=path)
    for content in (path.read_bytes(), path.read_bytes()[:1000], b"no checkpoint"):
        path.write_bytes(content)
        progress = Stages()
        network, _ = run(*networks(), data, checkpoint=path, progress=progress)
        assert progress.steps == 32
        assert equal(network, whole)
    progress = Stages()
    run(*networks(), data, ReconstructOptions(12, 8, 16, 4e-3, ("flip",)), checkpoint=path, progress=progress)
    assert progress.steps == 32


def test_what_cannot_be_improved_comes_back_as_it_was(images):
    student, teacher = networks(noise=0)
    network, step = run(student, teacher, images(64))
    assert equal(network, teacher)
    assert not step.is_kept
    assert step.damage_before == step.damage_after == pytest.approx(0, abs=1e-9)


def test_the_best_state_is_what_is_kept_not_the_last(images, monkeypatch):
    monkeypatch.setattr(module, "_STEPS_PER_LOOK", 4)
    monkeypatch.setattr(module, "_one_cycle", lambda step, steps: 1 if step < 4 else 1000)
    data = images(64)
    student, teacher = networks(noise=1)
    network, step = run(student, teacher, data)
    assert step.is_kept
    batches = [torch.from_numpy(batch) for batch, _ in data[1].batches(24)]
    assert network_damage(teacher, network, batches) == pytest.approx(step.damage_after, rel=1e-4)


def test_no_gradients_are_computed_for_what_is_not_trained(images, monkeypatch):
    counts = []

    def count(optimizer, rate, loss_of, batch):
        nodes, leaves = [loss_of(batch).grad_fn], set()
        while nodes:
            node = nodes.pop()
            leaves |= {node} if hasattr(node, "variable") else set()
            nodes += [following for following, _ in node.next_functions if following is not None]
        counts.append((len(leaves), len(optimizer.param_groups[0]["params"])))
        return True

    monkeypatch.setattr(module, "_descend", count)
    run(*networks(), images(64), ReconstructOptions(1, 1, 16))
    assert counts == [(4, 4), (4, 4), (8, 8)]


def test_an_unstable_block_goes_back_to_its_best_state(images, monkeypatch):
    monkeypatch.setattr(module, "_STEPS_PER_LOOK", 4)
    real, steps = module.feature_loss, []

    def overflows(student, teacher):
        loss = real(student, teacher)
        if loss.requires_grad:
            steps.append(loss)
        return loss * float("inf") if len(steps) in (6, 7) and loss.requires_grad else loss

    data = images(64)
    monkeypatch.setattr(module, "feature_loss", overflows)
    network, step = run(*networks(), data)
    assert "block 1 of 2, up to first became unstable" in step.detail
    assert "block 2 of 2, up to second became unstable" in step.detail
    assert len(steps) == 6 + 1 + 8  # the second block's first step overflows
    assert step.is_kept
    assert all(torch.isfinite(value).all() for value in network.state_dict().values())


def test_a_network_of_nan_comes_back_as_it_was(images):
    student, teacher = networks()
    student.first[0].weight.data[0, 0, 0, 0] = float("nan")
    network, step = run(student, teacher, images(64))
    assert not step.is_kept
    assert torch.isnan(network.first[0].weight).sum() == 1


@pytest.mark.parametrize("kind", [Several, Detached, Undifferentiable])
def test_any_outputs_are_imitated_and_what_has_no_gradients_is_left(images, kind):
    data = images(64)
    student, teacher = networks(kind)
    network, step = run(student, teacher, data, blocks=(BLOCKS[0], Block("", ("second.0",))))
    if kind is Several:
        assert step.is_kept
        assert step.damage_after < 0.5 * step.damage_before
        assert not torch.equal(network.linear.weight, student.linear.weight)  # in the last block
    elif kind is Detached:
        assert step.detail.startswith("2 blocks")  # the first can learn
        assert torch.equal(network.second[0].weight, student.second[0].weight)
    else:
        assert not step.is_kept
        assert step.detail.startswith("the network cannot be trained: RuntimeError: one of the variables")
        assert equal(network, student)


def test_a_lack_of_memory_is_not_the_networks_fault(images, monkeypatch):
    """It would be remembered as the stage's result."""

    def full(*_given, **_options):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(torch.Tensor, "backward", full)
    with pytest.raises(UnsupportedModelError) as caught:
        run(*networks(), images(64))
    assert is_out_of_memory(caught.value)


def test_no_gradient_at_all_is_said(images):
    student, teacher = networks()
    student.requires_grad_(False)
    network, step = run(student, teacher, images(64))
    assert not step.is_kept
    assert step.detail == "no gradient reaches the converted layers"
    assert equal(network, student)


def test_few_images_are_enough(images):
    _, step = run(*networks(), images(5))
    assert "5 of 5 images a step" in step.detail
    _, step = run(*networks(), images(1), ReconstructOptions(4, 4, 16))
    assert "1 of 1 images a step" in step.detail


def test_few_images_are_not_seen_over_and_over(images):
    _, step = run(*networks(), images(5), ReconstructOptions(400, 400, 16))
    assert step.detail.startswith("2 blocks of 15 steps, 60 of all together (fewer than asked for")


def test_large_networks_get_fewer_steps_images_and_smaller_batches(images, monkeypatch):
    data = images(64)
    monkeypatch.setattr(module, "_MAX_MACS", 1e7)
    monkeypatch.setattr(module, "_BATCH_BYTES", 50_000)
    monkeypatch.setattr(module, "_HELD_OUT_IMAGES", (8, 512))
    monkeypatch.setattr(module, "_EVALUATION_MACS", 0)
    progress = Stages()
    _, step = run(*networks(), data, progress=progress)
    assert step.images == 8
    assert "(fewer than asked for: the network is large or the images are few)" in step.detail
    assert 3 <= progress.steps < 20
    batch_size = int(step.detail.split("; ")[1].split()[0])
    assert 1 < batch_size < 16


def test_a_gpu_that_cannot_run_the_network_is_not_used(images, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(nn.Module, "to", lambda self, device: 1 / 0)
    network, step = run(*networks(), images(64))
    assert step.is_kept
    assert {weight.device.type for weight in network.parameters()} == {"cpu"}


def test_augmentations_are_those_that_the_original_tolerates(images, monkeypatch):
    asked = []

    def tolerated(original, batches, layout):
        asked.append((layout, sum(map(len, batches))))
        return ("color",)

    monkeypatch.setattr(module, "tolerated_augmentations", tolerated)
    _, step = run(*networks(), images(64), ReconstructOptions(2, 2, 16))
    assert asked == [("NCHW", 64)]
    assert "augmentation: color" in step.detail
    _, step = run(*networks(), images(64), ReconstructOptions(2, 2, 16, augment=()))
    assert "augmentation: none" in step.detail
    assert len(asked) == 1


def test_the_learning_rate_rises_and_falls():
    rates = [module._one_cycle(step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.04)
    assert max(rates) == rates[30] == 1
    assert rates[-1] < 0.001
    assert module._one_cycle(0, 1) == pytest.approx(0.04)
