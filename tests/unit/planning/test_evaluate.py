import numpy as np
import pytest
import torch
from torch import nn

from sepdeploy.analyze.trace import trace_network
from sepdeploy.data.images import open_images
from sepdeploy.errors import UnsupportedModelError
from sepdeploy.planning import evaluate
from sepdeploy.planning.evaluate import Evaluator, batch_size_for, prefer_channels_last, run_network, tensor_batches


@pytest.fixture
def images(tmp_path):
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "i.npz", images=rng.integers(0, 256, (2000, 4, 4, 3), np.uint8))
    return open_images(str(tmp_path / "i.npz"), role="validation")


class Scores(nn.Module):
    """Reads class scores off the image; `wrong` of them are turned round, spread evenly."""

    def __init__(self, wrong_ratio=0.0) -> None:
        super().__init__()
        self.wrong_ratio = wrong_ratio
        self.runs = 0

    def forward(self, x):
        self.runs += len(x)
        scores = x[:, :, 0, 0]
        is_wrong = (x[:, 0, 1, 1] * 255).round() % 100 < 100 * self.wrong_ratio
        return torch.where(is_wrong[:, None], -scores, scores)


def test_quality_of_the_original(images):
    quality = Evaluator(Scores(), images, 64).original_quality()
    assert quality.images == 2000
    assert quality.drop_points == 0
    assert quality.agreement_ratio == 1


def test_the_original_runs_once_per_image(images):
    original = Scores()
    evaluator = Evaluator(original, images, 64)
    evaluator.original_quality()
    evaluator.quality(Scores())
    evaluator.quality(Scores(), 1.0)
    assert original.runs == 2000


def test_outputs_that_are_not_kept_are_computed_again_and_are_the_same(images, monkeypatch):
    kept = Evaluator(Scores(), images, 64)
    monkeypatch.setattr(evaluate, "_KEPT_OUTPUT_BYTES", 3000)
    original = Scores()
    evaluator = Evaluator(original, images, 64)
    assert evaluator.quality(Scores(0.5)) == kept.quality(Scores(0.5))
    assert evaluator.quality(Scores(0.5)) == kept.quality(Scores(0.5))
    assert 2000 < original.runs < 4000


@pytest.mark.parametrize(("wrong", "limit"), [(0.5, 1.0), (0.0, 20.0)])
def test_clear_cases_end_early_on_the_right_side(images, wrong, limit):
    quality, is_partial = Evaluator(Scores(), images, 64).quality(Scores(wrong), limit)
    assert is_partial
    assert 512 <= quality.images < 2000
    full, _ = Evaluator(Scores(), images, 64).quality(Scores(wrong))
    assert (quality.drop_points <= limit) == (full.drop_points <= limit)


def test_close_cases_and_calls_without_a_limit_see_every_image(images):
    evaluator = Evaluator(Scores(), images, 64)
    full, is_partial = evaluator.quality(Scores(0.3))
    assert (full.images, is_partial) == (2000, False)
    close, is_partial = evaluator.quality(Scores(0.3), full.drop_points)
    assert (close, is_partial) == (full, False)


def test_few_images_never_decide_early(images):
    quality, is_partial = Evaluator(Scores(), images.head(500), 64).quality(Scores(0.9), 0.0)
    assert (quality.images, is_partial) == (500, False)


def test_progress_counts_images(images):
    seen = []
    Evaluator(Scores(), images, 600, lambda done, total: seen.append((done, total))).quality(Scores())
    assert seen == [(600, 2000), (1200, 2000), (1800, 2000), (2000, 2000)]


class Lambda(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda x: x.mean((2, 3)) * float("nan"), "returns NaN on validation images"),
        (lambda x: x.reshape(1, 3, 4, 4), "runs on one image but not on 64 at once: shape"),
        (lambda x: x.mean(0), r"returns a tensor of shape \(3, 4, 4\) for 64 images"),
        (lambda x: (x.mean((2, 3)), x.mean()), r"returns a tensor of shape \(\) for 64 images"),
        (lambda x: x.flatten(1).t(), r"\(48, 64\) for 64 images; .*return that one with \.transpose\(0, 1\)"),
    ],
)
def test_networks_that_cannot_be_evaluated(images, function, message):
    with pytest.raises(UnsupportedModelError, match=message):
        Evaluator(Lambda(function), images, 64).original_quality()


def test_networks_that_work_in_place_leave_the_images_alone(images):
    evaluator = Evaluator(Lambda(lambda x: x.sub_(0.5).mean((2, 3))), images, 64)
    evaluator.original_quality()
    for batch, outputs, _ in evaluator.reference_batches():
        np.testing.assert_allclose(batch.mean((2, 3)) - 0.5, outputs[0], atol=1e-6)
    batch = torch.ones(2, 1, 3, 3)
    run_network(Lambda(lambda x: x.zero_()), batch)
    assert batch.min() == 1


def flattening(function) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1), Lambda(function)).eval()


@pytest.mark.parametrize(
    ("function", "is_taken"),
    [(lambda x: x.view(x.size(0), -1), False), (lambda x: x.flatten(1), True), (lambda x: x.mean((2, 3)), True)],
)
def test_channels_last_only_where_the_network_takes_it(images, function, is_taken):
    net = flattening(function)
    x = torch.rand(5, 3, 4, 4)
    with torch.no_grad():
        expected = net(x)
    assert prefer_channels_last(net, x[:1]) is net
    assert net[1].weight.is_contiguous(memory_format=torch.channels_last) == is_taken
    np.testing.assert_allclose(run_network(net, x)[0], expected.numpy(), atol=1e-5)
    assert Evaluator(net, images, 64).original_quality().images == 2000
    for batch in tensor_batches(images.head(100), 64)():
        run_network(net, batch)


def test_batch_size_follows_the_largest_convolution():
    net = nn.Conv2d(64, 8, 3, padding=1)
    assert batch_size_for(trace_network(net, torch.zeros(1, 64, 8, 8))) == 64
    # 64 channels x 9 taps x 256 x 256 floats are 151 MB an image: one fits into 256 MiB.
    assert batch_size_for(trace_network(net, torch.zeros(1, 64, 256, 256))) == 1
    assert batch_size_for(trace_network(nn.Flatten(), torch.zeros(1, 1, 2, 2))) == 64
