import copy
import json
import re
import sys
import types

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from torch import nn

from sepdeploy.analyze.damage import network_damage
from sepdeploy.core.codec import to_data
from sepdeploy.core.progress import Silent
from sepdeploy.core.training import TrainOptions
from sepdeploy.data.images import open_images
from sepdeploy.data.preprocess import Preprocess
from sepdeploy.errors import UnsupportedModelError, UsageError
from sepdeploy.train import checkpoint, processes
from sepdeploy.train import finetune as finetune_module
from sepdeploy.train.finetune import finetune
from sepdeploy.train.objective import labels_fit

PREPROCESS = Preprocess(mean=(0.5,), std=(0.25,))


class Classifier(nn.Module):
    """Two convolutions with batch norms; 'relu' is in place, so that features must be copies."""

    def __init__(self, outputs=4):
        super().__init__()
        self.a, self.norm_a = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.b, self.norm_b = nn.Conv2d(8, 8, 3, padding=1, stride=2), nn.BatchNorm2d(8)
        self.relu, self.linear = nn.ReLU(inplace=True), nn.Linear(8, outputs)

    def maps(self, x):
        return self.relu(self.norm_b(self.b(self.relu(self.norm_a(self.a(x))))))

    def forward(self, x):
        return self.linear(self.maps(x).mean((2, 3)))


class Several(Classifier):
    """Boxes, a map and integers in a dictionary; the input is normalized in place."""

    def forward(self, x):
        maps = self.maps(x.mul_(0.9))
        return {"boxes": [self.linear(maps.flatten(2).mT), None], "map": maps.mean(1), "count": torch.tensor([len(x)])}


class Segmenter(Classifier):
    def forward(self, x):
        return self.linear(self.maps(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def teacher_of(kind=Classifier, seed=0, **options):
    """A network whose outputs depend on the image well beyond rounding."""
    torch.manual_seed(seed)
    network = kind(**options)
    nn.init.normal_(network.linear.weight, std=2)
    with torch.no_grad():
        for _ in range(20):
            network.train()(torch.randn(32, 3, 8, 8) / 0.5)
    return network.eval()


def student_of(teacher, noise=0.3):
    student = copy.deepcopy(teacher)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in student.parameters():
            if weight.dim() == 4:
                weight += noise * weight.std() * torch.randn_like(weight)
    return student


@pytest.fixture
def make_images(tmp_path):
    def make(count=64, labels=None, seed=0, name="set"):
        path = tmp_path / f"{name}{count}{seed}.npz"
        pixels = np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 3), np.uint8)
        # Smooth in one direction, so that images differ in their mean colours.
        pixels = (pixels * np.random.default_rng(seed + 1).random((count, 1, 1, 3))).astype(np.uint8)
        np.savez(path, images=pixels, **({} if labels is None else {"labels": labels}))
        return open_images(str(path), role="validation", preprocess=PREPROCESS)

    return make


def labels_by(network, images):
    batch = torch.from_numpy(next(images.batches(len(images)))[0])
    with torch.no_grad():
        return network(batch).argmax(1).numpy()


def options_of(**changes):
    return TrainOptions(**{"epochs": 2, "batch_size": 16, "augment": ("flip", "shift"), **changes})


def run(student, teacher, images, held_out, folder, options=None, features=("b",), progress=None, **judging):
    return finetune(
        student, teacher, images, held_out, options or options_of(),
        features=features, folder=folder, progress=progress or Silent(), **judging,
    )  # fmt: skip


def weights_of(network):
    return {name: value.clone() for name, value in network.state_dict().items()}


def assert_equal(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("kind", [Classifier, Several, Segmenter])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_student_comes_nearer_to_any_outputs(kind, optimizer, make_images, tmp_path):
    teacher = teacher_of(kind)
    student = student_of(teacher).requires_grad_(True)
    given, original = weights_of(student), weights_of(teacher)
    flags = [weight.requires_grad for weight in student.parameters()]
    options = options_of(epochs=8, optimizer=optimizer, batch_norm="frozen", temperature=1.0)
    network, step, history = run(student, teacher, make_images(), make_images(32, seed=5), tmp_path / "run", options)
    assert step.name == "fine-tuning"
    assert step.is_kept
    assert step.images == 32
    # Relative errors have flatter slopes than divergences, which only AdamW does not feel.
    assert step.damage_after < (0.5 if optimizer == "adamw" else 0.9) * step.damage_before
    assert step.damage_after == min(metrics.held_out_damage for metrics in history)
    assert history[-1].loss < history[0].loss
    assert [(metrics.epoch, metrics.step) for metrics in history] == [(n, 4 * n) for n in range(1, 9)]
    assert_equal(weights_of(student), given)
    assert_equal(weights_of(teacher), original)
    assert [weight.requires_grad for weight in network.parameters()] == flags
    assert all(weight.dtype == torch.float32 and weight.device.type == "cpu" for weight in network.parameters())
    assert not any(module.training for module in network.modules())
    assert type(network) is kind
    assert not any(module._forward_hooks for module in (*student.modules(), *teacher.modules(), *network.modules()))


def test_accuracy_decides_where_there_are_labels(make_images, tmp_path):
    teacher = teacher_of()
    labels = labels_by(teacher, make_images())
    images = make_images(64, labels, name="labelled")
    held_out = make_images(64, labels, name="judge")
    assert "labels" not in run(student_of(teacher), teacher, images, held_out, tmp_path, options_of(epochs=1))[1].detail
    student = student_of(teacher, noise=2.0)
    network, step, history = run(student, teacher, images, held_out, tmp_path, options_of(epochs=10))
    ratios = [metrics.held_out_accuracy_ratio for metrics in history]
    assert step.is_kept
    reached = float((labels_by(network, held_out) == labels).mean())
    assert reached == pytest.approx(max(ratios))
    assert reached > float((labels_by(student, held_out) == labels).mean())
    best = max(history, key=lambda metrics: (metrics.held_out_accuracy_ratio, -metrics.held_out_damage))
    assert step.damage_after == best.held_out_damage
    assert f"the best was epoch {best.epoch}" in step.detail


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_what_is_measured_is_what_is_returned(decay, make_images, tmp_path):
    teacher = teacher_of()
    student, held_out = student_of(teacher, 1.0), make_images(20, seed=5)
    network, step, _ = run(student, teacher, make_images(), held_out, tmp_path, options_of(ema_decay=decay))
    before, after = (
        network_damage(teacher, each, [torch.from_numpy(next(held_out.batches(20))[0])]) for each in (student, network)
    )
    assert step.is_kept
    assert (step.damage_before, step.damage_after) == pytest.approx((before, after), rel=1e-5)


def test_a_training_that_only_harms_is_not_kept(make_images, tmp_path):
    teacher = teacher_of()
    student = student_of(teacher, noise=0.01)
    options = options_of(epochs=1, learning_rate=0.3, optimizer="adamw", ema_decay=0.0)
    network, step, _ = run(student, teacher, make_images(), make_images(seed=5), tmp_path, options)
    assert not step.is_kept
    assert step.damage_after > step.damage_before
    assert_equal(weights_of(network), weights_of(student))


def test_labels_that_the_network_does_not_know_are_refused(make_images, tmp_path):
    teacher = teacher_of()
    wrong, right = make_images(4, np.arange(4) + 1), make_images(8, np.arange(8) % 4)
    for images, held_out in ((wrong, right), (right, wrong)):
        with pytest.raises(UsageError, match=r"labels in .*npz go up to 4, but the network has 4 classes, 0 to 3"):
            run(student_of(teacher), teacher, images, held_out, tmp_path)
    run(student_of(teacher), teacher, wrong, make_images(8), tmp_path, options_of(label_weight=0.0, epochs=1))


def test_labels_that_the_original_is_wrong_about_are_ignored(make_images, tmp_path):
    teacher = teacher_of()
    right = labels_by(teacher, make_images())
    shifted, own = make_images(64, (right + 1) % 4, name="shifted"), make_images(64, right, name="own")
    _, step, history = run(student_of(teacher), teacher, shifted, own, tmp_path, options_of(epochs=1))
    assert re.search(r"; labels ignored: the original network is right about 0 of 64 images in .*shifted", step.detail)
    assert history[0].held_out_accuracy_ratio is not None, "those of the held-out images are right"
    _, step, history = run(student_of(teacher), teacher, own, shifted, tmp_path, options_of(epochs=1))
    assert re.search(r"labels ignored: .*shifted", step.detail)
    assert history[0].held_out_accuracy_ratio is None
    plain = run(student_of(teacher), teacher, make_images(), make_images(), tmp_path / "plain", options_of(epochs=1))
    both = run(student_of(teacher), teacher, shifted, shifted, tmp_path / "both", options_of(epochs=1))
    assert both[1].detail.count("shifted") == 1
    assert_equal(weights_of(both[0]), weights_of(plain[0]))


@pytest.mark.parametrize(("folders", "is_used"), [(2, False), (3, False), (4, True), (5, False)])
def test_class_folders_must_be_as_many_as_the_classes(folders, is_used, make_images, tmp_path):
    teacher = teacher_of()
    images = make_images()
    pixels = np.load(images.path)["images"]
    for index, (image, label) in enumerate(zip(pixels, labels_by(teacher, images), strict=True)):
        path = tmp_path / "folders" / f"class{label % folders}" / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    for number in range(folders):
        (tmp_path / "folders" / f"class{number}").mkdir(exist_ok=True)
    found = open_images(str(tmp_path / "folders"), role="validation", preprocess=PREPROCESS)
    _, step, history = run(student_of(teacher), teacher, found, found, tmp_path, options_of(epochs=1))
    assert (history[0].held_out_accuracy_ratio is not None) == is_used
    reason = f"labels ignored: {tmp_path / 'folders'} has {folders} class folders, but the network 4 classes"
    assert (reason in step.detail) == (not is_used)


@pytest.mark.parametrize(("classes", "right", "is_used"), [(2, 38, False), (2, 39, True), (4, 32, False),
                                                           (4, 33, True), (100, 3, False), (100, 4, True)])  # fmt: skip
def test_labels_must_be_right_more_often_than_by_chance(classes, right, is_used, make_images):
    class FirstClass(nn.Module):
        def forward(self, x):
            return torch.eye(classes)[:1].repeat(len(x), 1)

    labels = np.where(np.arange(64) < right, 0, 1)
    images = make_images(64, labels, name=f"right{right}of{classes}")
    assert labels_fit(images, classes, FirstClass(), 16, Accelerator(cpu=True))[0] == is_used


def test_labels_of_something_else_are_no_labels_for_maps(make_images, tmp_path):
    teacher = teacher_of(Segmenter)
    images = make_images(16, np.arange(16) + 100)
    _, _, history = run(student_of(teacher), teacher, images, images, tmp_path)
    assert history[0].held_out_accuracy_ratio is None


class StoppedError(Exception):
    pass


class StopsIn:
    """Kills the run as soon as an epoch begins."""

    def __init__(self, epoch):
        self.epoch = epoch

    def stage(self, text):
        if text.startswith(f"fine-tuning: epoch {self.epoch} "):
            raise StoppedError

    def step(self, done, total):
        pass


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"optimizer": "sgd", "batch_norm": "frozen"},
        {"ema_decay": 0.0},
        {"precision": "bfloat16"},
        {"precision": "float16"},
    ],
)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(changes, make_images, tmp_path):
    teacher = teacher_of()
    student, images, held_out = student_of(teacher, 1.0), make_images(50), make_images(20, seed=5)
    options = options_of(epochs=3, **changes)
    whole, whole_step, whole_history = run(student, teacher, images, held_out, tmp_path / "whole", options)
    folder = tmp_path / "killed"
    for epoch in (2, 3):
        with pytest.raises(StoppedError):
            run(student, teacher, images, held_out, folder, options, progress=StopsIn(epoch))
        assert len((folder / "metrics.jsonl").read_text().splitlines()) == epoch - 1
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 3, "of": "a run that was killed before its checkpoint"}\n')
    network, step, history = run(student, teacher, images, held_out, folder, options)
    assert_equal(weights_of(network), weights_of(whole))
    assert step == whole_step
    for one, other in zip(history, whole_history, strict=True):
        assert {**to_data(one), "seconds": 0} == {**to_data(other), "seconds": 0}
    assert [json.loads(line)["epoch"] for line in (folder / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3]
    with pytest.raises(StoppedError):  # a finished run starts no epoch
        run(student, teacher, images, held_out, folder, options_of(epochs=4, **changes), progress=StopsIn(1))
    again, _, _ = run(student, teacher, images, held_out, folder, options, progress=StopsIn(1))
    assert_equal(weights_of(again), weights_of(whole))


def test_other_inputs_start_anew(make_images, tmp_path, monkeypatch):
    teacher = teacher_of()
    student, images, held_out = student_of(teacher), make_images(), make_images(20, seed=5)
    run(student, teacher, images, held_out, tmp_path)
    key = checkpoint.run_key(student, teacher, images, held_out, options_of(), ())
    assert key == checkpoint.run_key(copy.deepcopy(student), teacher, images, held_out, options_of(), ())
    frozen = copy.deepcopy(student)
    frozen.a.weight.requires_grad_(False)
    leaky = copy.deepcopy(student)
    leaky.relu = nn.LeakyReLU(inplace=True)
    others = (
        (student_of(teacher, 0.2), teacher, images, held_out, options_of()),
        (student, teacher_of(seed=3), images, held_out, options_of()),
        (student, teacher, make_images(63), held_out, options_of()),
        (student, teacher, images, make_images(20, seed=6), options_of()),
        (student, teacher, images, held_out, options_of(seed=1)),
        (frozen, teacher, images, held_out, options_of()),
        (leaky, teacher, images, held_out, options_of()),
    )
    for *inputs, options in others:
        with pytest.raises(StoppedError):
            run(*inputs, tmp_path, options, progress=StopsIn(1))
    with pytest.raises(StoppedError):  # the best epoch may be another by damage than by accuracy
        run(student, teacher, images, held_out, tmp_path, progress=StopsIn(1), by_damage=True)
    for place in (checkpoint, torch):
        with monkeypatch.context() as elsewhere:
            elsewhere.setattr(place, "__version__", "another")
            assert checkpoint.run_key(student, teacher, images, held_out, options_of(), ()) != key
    (tmp_path / "checkpoint.pt").write_bytes(b"half a file")
    with pytest.raises(StoppedError):
        run(student, teacher, images, held_out, tmp_path, progress=StopsIn(1))


def test_seeds_decide(make_images, tmp_path):
    teacher = teacher_of()
    inputs = student_of(teacher, 1.0), teacher, make_images(), make_images(20, seed=5)
    one, other, same = (
        run(*inputs, tmp_path / str(place), options_of(seed=seed))[0] for place, seed in enumerate((0, 2**62, 0))
    )
    assert_equal(weights_of(one), weights_of(same))
    assert not torch.equal(one.a.weight, other.a.weight)


def test_frozen_weights_stay_and_their_norms_with_them(make_images, tmp_path):
    teacher = teacher_of()
    student = student_of(teacher, 1.0)
    student.a.weight.requires_grad_(False)
    student.norm_a.requires_grad_(False)
    network, step, _ = run(student, teacher, make_images(), make_images(20, seed=5), tmp_path, options_of(epochs=4))
    assert step.is_kept
    for name, value in network.state_dict().items():
        is_frozen = name.startswith(("a.", "norm_a."))
        assert torch.equal(value, student.state_dict()[name]) == is_frozen, name
    assert not network.a.weight.requires_grad
    assert network.b.weight.requires_grad
    with pytest.raises(UsageError, match="every weight of the network is frozen"):
        run(student.requires_grad_(False), teacher, make_images(), make_images(20), tmp_path / "none")


def test_shared_and_unused_weights_and_norms_without_statistics(make_images, tmp_path):
    class Odd(Classifier):
        def __init__(self):
            super().__init__()
            self.c, self.unused = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.Linear(3, 3)
            self.norm_b = nn.BatchNorm2d(8, track_running_stats=False)
            self.again = self.b
            self.c.weight = self.b.weight

        def forward(self, x):
            return self.linear(self.c(self.again(self.b(self.norm_a(self.a(x))))).mean((2, 3)))

    teacher = teacher_of(Odd)
    student = student_of(teacher)
    network, _, _ = run(student, teacher, make_images(), make_images(20, seed=5), tmp_path, options_of(epochs=4))
    assert network.c.weight is network.b.weight
    assert network.again is network.b
    assert torch.equal(network.unused.weight, student.unused.weight)
    assert not torch.equal(network.b.weight, student.b.weight)


def test_norms_collect_statistics_only_if_told_and_nothing_else_trains(make_images, tmp_path):
    class Dropping(Classifier):
        def forward(self, x):
            assert not self.training
            return nn.functional.dropout(super().forward(x), 0.9, self.training)

    teacher = teacher_of(Classifier)
    student = Dropping()
    student.load_state_dict(student_of(teacher).state_dict())
    student.eval()
    for mode in ("train", "frozen"):
        options = options_of(batch_norm=mode, learning_rate=1e-3)
        network, step, _ = run(student, teacher, make_images(), make_images(20, seed=5), tmp_path / mode, options)
        assert step.is_kept
        assert torch.equal(network.norm_a.running_mean, student.norm_a.running_mean) == (mode == "frozen")
        assert ("batch norms frozen" in step.detail) == (mode == "frozen")


def test_few_images_shrink_the_batch(make_images, tmp_path):
    teacher = teacher_of()
    for count, norms in ((5, "train"), (1, "frozen")):
        images = make_images(count)
        _, step, history = run(student_of(teacher), teacher, images, images, tmp_path / str(count))
        assert f"2 epochs of 1 steps with {count} images" in step.detail
        assert ("batch norms frozen" in step.detail) == (norms == "frozen")
        assert history[-1].step == 2


def test_every_epoch_sees_each_image_at_most_once_in_an_order_of_its_own(make_images, tmp_path, monkeypatch):
    teacher = teacher_of()
    images = make_images(40)
    seen = []
    original = finetune_module._Run._augmented

    def record(self, part, step):
        seen.append((step, part.clone()))
        return original(self, part, step)

    monkeypatch.setattr(finetune_module._Run, "_augmented", record)
    run(student_of(teacher), teacher, images, images, tmp_path)
    assert [step for step, _ in seen] == [0, 1, 2, 3]
    orders = [torch.cat([part for step, part in seen if step // 2 == epoch]).flatten(1) for epoch in (0, 1)]
    known = torch.from_numpy(next(images.batches(40))[0]).flatten(1)
    places = [[int((known == image).all(1).nonzero()) for image in order] for order in orders]
    assert all(len(set(order)) == 32 for order in places)
    assert places[0] != places[1]


def test_diverging_training_says_what_to_do_and_keeps_its_checkpoint(make_images, tmp_path, monkeypatch):
    teacher = teacher_of()
    images = make_images()
    original = finetune_module._Run._augmented
    monkeypatch.setattr(
        finetune_module._Run, "_augmented",
        lambda self, part, step: original(self, part, step) * (float("inf") if step == 5 else 1),
    )  # fmt: skip
    with pytest.raises(UsageError, match=r"diverged in epoch 2.* --learning-rate below 0\.003; .*epoch 1 is kept"):
        run(student_of(teacher), teacher, images, images, tmp_path)
    monkeypatch.undo()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1
    _, _, history = run(student_of(teacher), teacher, images, images, tmp_path, progress=StopsIn(1))
    assert len(history) == 2


def test_what_cannot_be_imitated_is_refused(make_images, tmp_path):
    teacher = teacher_of()
    images = make_images(16)
    broken = copy.deepcopy(teacher)
    broken.a.weight.data[0, 0, 0, 0] = float("nan")
    with pytest.raises(UnsupportedModelError, match="original network returns NaN"):
        run(student_of(teacher), broken, images, images, tmp_path)
    with pytest.raises(UnsupportedModelError, match="shapes"):
        run(teacher_of(outputs=3), teacher, images, images, tmp_path)
    with pytest.raises(UsageError, match="nothing to learn from"):
        run(student_of(teacher), teacher, images, images, tmp_path, options_of(distill_weight=0.0, feature_weight=0.0))


def test_precisions_that_the_machine_lacks_are_refused(make_images, tmp_path, monkeypatch):
    def refuse(**options):
        raise ValueError("bf16 needs\nanother device")

    monkeypatch.setattr(processes, "Accelerator", refuse)
    with pytest.raises(UsageError, match=r"cannot train in bfloat16 here \(bf16 needs\); choose --precision float32"):
        run(teacher_of(), teacher_of(), make_images(16), make_images(16), tmp_path, options_of(precision="bfloat16"))


@pytest.mark.parametrize("parts", ["distill", "feature", "label"])
def test_every_part_of_the_loss_teaches_alone(parts, make_images, tmp_path):
    teacher = teacher_of()
    labels = labels_by(teacher, make_images())
    images = make_images(64, labels, name="labelled")
    weights = {f"{part}_weight": float(part == parts) for part in ("distill", "feature", "label")}
    student = student_of(teacher, 1.0)
    options = options_of(epochs=6, batch_norm="frozen", **weights)
    network, _, history = run(student, teacher, images, images, tmp_path, options)
    assert history[-1].loss < 0.7 * history[0].loss
    assert not torch.equal(network.a.weight, student.a.weight)
    assert torch.equal(network.linear.weight, student.linear.weight) == (parts == "feature")


def test_augmentation_is_chosen_from_what_the_original_tolerates(make_images, tmp_path):
    teacher = teacher_of()
    images = make_images()
    _, step, _ = run(student_of(teacher), teacher, images, images, tmp_path, options_of(augment=None))
    assert "augmentation: flip" in step.detail
    _, step, _ = run(student_of(teacher), teacher, images, images, tmp_path, options_of(augment=()))
    assert "augmentation: none" in step.detail


def test_tensorboard_gets_the_metrics_where_it_is_installed(make_images, tmp_path, monkeypatch):
    scalars, opened = [], []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            opened.append((folder, purge_step))

        def add_scalar(self, name, value, step):
            scalars.append((name, value, step))

        def flush(self):
            pass

        def close(self):
            opened.append("closed")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=SummaryWriter))
    teacher = teacher_of()
    images = make_images(16)
    _, _, history = run(student_of(teacher), teacher, images, images, tmp_path)
    assert opened == [(str(tmp_path / "tensorboard"), 1), "closed"]
    assert ("fine-tuning/loss", history[1].loss, 2) in scalars
    assert {name for name, _, _ in scalars} == {
        f"fine-tuning/{name}" for name in ("step", "learning_rate", "loss", "held_out_damage", "seconds")
    }
