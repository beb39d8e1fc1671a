"""Quantization-aware training of networks that are awkward to capture, and its refusal before anything takes long."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import sepdeploy
from sepdeploy.analyze.damage import network_damage
from sepdeploy.analyze.flow_graph import capture_graph
from sepdeploy.analyze.trace import trace_network
from sepdeploy.core.int8 import PLAIN
from sepdeploy.core.options import ConvertOptions
from sepdeploy.core.progress import Silent
from sepdeploy.core.training import TrainOptions
from sepdeploy.data.images import open_images
from sepdeploy.errors import UnsupportedModelError, UsageError
from sepdeploy.planning.evaluate import tensor_batches
from sepdeploy.quantize.simulate import fake_quantized
from sepdeploy.stages.int8 import LoneNorms, prepare_for_int8, without_lone_norms
from sepdeploy.stages.load import Inputs
from sepdeploy.stages.numerics import fold_network
from sepdeploy.stages.quantize_aware import qat_options, require_simulation, train_for_int8


class Awkward(nn.Module):
    """Loops over its images, so that a graph of it takes a fixed number, and has two names for one weight."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)
        self.third.weight = self.second.weight
        self.linear = nn.Linear(8 * 4 * 4, 4)

    def forward(self, x):
        x = torch.stack([self.first(image) for image in x]).relu()
        return self.linear(self.third(self.second(x).relu()).relu().flatten(1))


class PreActivation(nn.Module):
    """Norms that no convolution precedes, with weights and without."""

    def __init__(self, norm, inner):
        super().__init__()
        self.stem, self.second, self.linear = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Linear(8, 4)
        self.inner, self.norm, self.last = inner, norm, nn.BatchNorm2d(8, affine=False)
        self.flat = nn.BatchNorm1d(4)
        for norm in (self.inner, self.norm, self.last, self.flat):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.inner(self.second(self.norm(x).relu()))
        return self.flat(self.linear(self.last(x).relu().mean((2, 3))))


class ByValue(Awkward):
    def forward(self, x):
        return super().forward(x) if x.sum() > -1e9 else x


@pytest.fixture
def inputs(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (24, 6, 6, 3), np.uint8)
    np.savez(tmp_path / "images.npz", images=pixels)
    images = open_images(str(tmp_path / "images.npz"), role="calibration")
    torch.manual_seed(0)
    network = Awkward().eval().requires_grad_(False)
    return Inputs(network, SimpleNamespace(spec="net.py:net", sha256="0"), "0", images, images, images, ())


def test_one_image_at_a_time_and_two_names_for_a_weight(inputs, tmp_path):
    student = copy.deepcopy(inputs.network)
    for weight in student.parameters():
        weight += 0.05 * torch.randn_like(weight)  # there is something to learn
    student.requires_grad_(True)
    training = TrainOptions(
        epochs=4, batch_size=8, learning_rate=9.0, ema_decay=0, augment=(), is_quantization_aware=True
    )
    options = ConvertOptions(tmp_path, "net.py:net", "images", training=training, train="images", int8=PLAIN)
    traced = trace_network(inputs.network, inputs.example())
    images = inputs.calibration
    trained = train_for_int8(student, inputs, traced, images, images, options, tmp_path / "work", Silent())
    assert trained.step.is_kept
    assert trained.network.third.weight is trained.network.second.weight
    assert not torch.equal(trained.network.second.weight, student.second.weight)
    assert trained.step.damage_after < 0.9 * trained.step.damage_before
    graph = capture_graph(trained.network, inputs.example())
    simulated = fake_quantized(graph, {place.name: place.affine for place in trained.places})
    damage = network_damage(inputs.network, simulated, tensor_batches(images, 1)())
    assert damage == pytest.approx(trained.step.damage_after, rel=1e-3)


@pytest.mark.parametrize("is_plain", [True, False])
def test_norms_without_a_convolution_before_them_are_trained_as_their_files_have_them(
    is_plain, inputs, tmp_path, make_net
):
    holding = make_net("norm_with_children")[0]
    torch.manual_seed(0)
    network = PreActivation(*(nn.BatchNorm2d(8), nn.BatchNorm2d(8)) if is_plain else (holding[1], holding[5]))
    network = network.eval().requires_grad_(False)
    inputs = replace(inputs, network=network)
    student = copy.deepcopy(network).requires_grad_(True)
    with torch.no_grad():
        for weight in student.parameters():
            weight += 0.05 * torch.randn_like(weight)
    training = TrainOptions(epochs=4, batch_size=8, learning_rate=3.0, ema_decay=0, augment=())
    options = ConvertOptions(tmp_path, "net.py:net", "images", training=training, train="images", int8=PLAIN)
    traced = trace_network(network, inputs.example())
    images = inputs.calibration
    trained = train_for_int8(student, inputs, traced, images, images, options, tmp_path / "work", Silent())
    assert trained.step.is_kept
    assert trained.network.state_dict().keys() == network.state_dict().keys()
    assert not torch.equal(trained.network.norm.weight, student.norm.weight)
    folded = fold_network(trained.network, traced, next(images.batches(4))[0]).network
    written, norms = without_lone_norms(folded, inputs.example())  # as `deploy` does
    assert norms == LoneNorms({"linear": "flat"}, ("norm", "last"))
    settled = {place.name: place.affine for place in trained.places}
    prepared = prepare_for_int8(PLAIN, inputs, traced, written, 0, settled)
    assert {place.name: place.affine for place in prepared.places} == settled
    simulated = fake_quantized(capture_graph(prepared.network, inputs.example()), settled)
    damage = network_damage(network, simulated, tensor_batches(images, 1)())
    assert damage == pytest.approx(trained.step.damage_after, rel=1e-2)


def test_a_network_that_cannot_be_simulated_is_refused_before_any_training(inputs):
    require_simulation(inputs)
    network = ByValue().eval()
    with pytest.raises(UnsupportedModelError, match=r"--qat trains .* cannot be captured.* or leave out --qat"):
        require_simulation(Inputs(network, inputs.architecture, "0", inputs.calibration, inputs.calibration, None, ()))


def test_it_trains_in_float32_without_labels_at_a_low_rate():
    found = qat_options(TrainOptions(epochs=10, precision="bfloat16"))
    assert (found.epochs, found.precision, found.feature_weight, found.label_weight) == (3, "float32", 0, 0)
    assert found.learning_rate == pytest.approx(3e-6)
    assert qat_options(TrainOptions(distill_weight=0.0)).label_weight == 0.5  # there is nothing else to learn from


AWARE = TrainOptions(is_quantization_aware=True)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda given: ConvertOptions(**given, training=AWARE), "--qat .* needs images"),
        (lambda given: ConvertOptions(**given, training=AWARE, train="x", finetune_hook="a.py:f"), "the hook takes"),
        (
            lambda given: sepdeploy.convert(ConvertOptions(**given, training=AWARE, train="x"), finetune=print),
            "the hook takes",
        ),
        (lambda given: sepdeploy.finetune(given["output"], "x", training=AWARE, finetune="a.py:f"), "the hook takes"),
        (lambda given: sepdeploy.finetune(given["output"], "x", training=AWARE, finetune=print), "the hook takes"),
        (lambda given: sepdeploy.finetune(given["output"], training=AWARE, finetune=print), "the hook takes"),
    ],
)
def test_without_own_training_it_is_refused_at_once(tmp_path, act, message):
    given = {"model": tmp_path / "m.pt", "arch": "a:b", "calibration": "c", "output": tmp_path / "bundle"}
    with pytest.raises(UsageError, match=message):
        act(given)
    assert not (tmp_path / "bundle").exists()
