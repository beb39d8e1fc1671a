"""`--mixed auto` makes the target's int8 file, and only that, a mixed one, and says so."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from sepdeploy.core.artifact import Format, Precision, Role
from sepdeploy.core.conv import Trace
from sepdeploy.core.int8_proof import FloatReason
from sepdeploy.core.measurement import Method
from sepdeploy.core.mixed import Arithmetic, MixReason
from sepdeploy.core.options import ConvertOptions
from sepdeploy.core.plan import Plan, SchemeOptions
from sepdeploy.core.selection import Price
from sepdeploy.core.stage_store import StageStore
from sepdeploy.errors import UsageError
from sepdeploy.planning.evaluate import Evaluator
from sepdeploy.stages import mixed
from sepdeploy.stages.deploy import deploy
from sepdeploy.stages.mixed import Mixer, mixed_notes, read_mixed


class Images:
    """What is asked of a set of images."""

    sha256 = "images"
    preprocess = SimpleNamespace(layout="NCHW")
    pixels = np.random.default_rng(0).standard_normal((8, 8, 6, 6)).astype(np.float32)

    def __len__(self):
        return len(self.pixels)

    def head(self, count):
        return self

    def without(self, other):
        return self

    def split(self, ratio, seed):
        return self, self

    def batches(self, size):
        for start in range(0, len(self.pixels), size):
            yield self.pixels[start : start + size], None


class Run:
    """Deploys a network of three layers, again and again into the same folder."""

    def __init__(self, folder, **changes):
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.Conv2d(4, 4, 1))
        self.network.eval().requires_grad_(False)
        self.folder, self.stages = folder, []
        self.options = ConvertOptions(
            Path("model.pt"), "a:b", "images", scheme="dense", formats=(Format.ONNX,), precision=Precision.INT8,
            mixed="auto", **changes,
        )  # fmt: skip

    def stage(self, text):
        self.stages.append(text)

    def step(self, done, total):
        pass

    def deploy(self):
        self.stages = []
        images = Images()
        inputs = SimpleNamespace(
            calibration=images, validation=images, network=self.network, network_key=dict,
            example=lambda: torch.from_numpy(images.pixels[:1]),
        )  # fmt: skip
        self.store = StageStore(self.folder, on_change=lambda: None)
        trace = Trace(sites=(), input_shape=(1, 8, 6, 6), output_shapes=((1, 4, 6, 6),), total_macs=0, total_params=0)
        plan = Plan("dense", SchemeOptions(), ())
        mixer = Mixer(self.store, self.options, inputs, plan, Evaluator(self.network, images, 8), self)
        results = deploy(
            self.store, self.options, inputs, trace, self.network, Role.CONVERTED, "weights", self,
            is_final=True, mixer=mixer,
        )  # fmt: skip
        return next(result for result in results if result.artifact.precision is Precision.INT8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One for all, so that the network is exported once."""
    return tmp_path_factory.mktemp("mixed")


@pytest.fixture
def measured(monkeypatch):
    """Prices by the channels of a layer: only that from 8 to 4 is faster in float; what was priced and compared."""
    asked = []

    def price_blocks(target, groups, cache, **options):
        found = {}
        for block, others in groups.items():
            for other in others:
                asked.append(other)
                gain = (block.spec.in_channels, block.spec.out_channels) == (8, 4) and other.mixed is Arithmetic.FLOAT32
                value = -0.5 if gain else 0.5
                found[block, other] = Price(1.0, 1.0, value, value - 0.1, value + 0.1, "ms", 9, Method.WALL_CLOCK)
        if len(groups) == 3:
            last = next(block for block in groups if block.spec.in_channels == 4)
            found |= {(last, replace(last, mixed=each)): "it does not run" for each in mixed._OTHERS}
        return found

    monkeypatch.setattr(mixed, "price_blocks", price_blocks)
    monkeypatch.setattr(mixed._Files, "is_faster", lambda self, kept: True)
    return asked


def test_what_is_faster_in_float_is_so_in_the_file(folder, measured):
    run = Run(folder)
    result = run.deploy()
    assert [(layer.name, layer.reason) for layer in result.int8.float_layers] == [("2", FloatReason.MIXED_FASTER)]
    assert result.int8.int8_macs == 36 * (9 * 64 + 16)
    assert {block.mixed for block in measured} == {Arithmetic.FLOAT32, Arithmetic.WEIGHTS_ONLY}
    plan = read_mixed(run.store)
    assert plan.kept == {"2": Arithmetic.FLOAT32}
    assert [(layer.name, layer.reason) for layer in plan.layers] == [("0", None), ("2", MixReason.FASTER)]
    *notes, last = mixed_notes(plan)
    assert any("3 could not be measured in float: it does not run" in note for note in notes)
    assert "1 of 2 layers are not in int8: 2 (float32, -0.5 ms: it is cheaper so" in last
    count = len(measured)
    run.deploy()
    assert len(measured) == count  # nothing is measured again
    assert not any("mixed" in stage or "quantiz" in stage for stage in run.stages)


def test_a_limit_that_int8_breaks_is_held_by_layers_in_float(folder, measured, monkeypatch):
    points = {0: 9.0, 1: 4.0, 2: 0.5}
    monkeypatch.setattr(mixed._Files, "drop", lambda self, kept: points[len(kept)])
    monkeypatch.setattr(mixed._Files, "drop_of", lambda self, path: 0.0)
    run = Run(folder, max_drop_points=1.0)
    result = run.deploy()
    reasons = {layer.name: layer.reason for layer in result.int8.float_layers}
    assert reasons == {"0": FloatReason.MIXED_ACCURACY, "2": FloatReason.MIXED_FASTER}
    plan = read_mixed(run.store)
    assert (plan.drop_points, plan.mixed_drop_points) == (9.0, 0.5)
    (first,) = (layer for layer in plan.layers if layer.name == "0")
    assert first.sqnr_gain_db > 0  # measured on the real files
    assert "the file loses 0.50 points so, 9.00 all in int8" in mixed_notes(plan)[-1]


def test_mixed_is_for_int8():
    with pytest.raises(UsageError, match="add --precision int8"):
        ConvertOptions(Path("model.pt"), "a:b", "images", mixed="auto")
