"""`--mixed auto` makes the target's int8 file, and only that, a mixed one, and says so."""

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
from sepdeploy.planning.price import NOT_MEASURED
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

    def deploy(self, *, is_new=True):
        """The int8 file; by another process that finds the folder, unless it is not `is_new`."""
        self.stages = []
        images = Images()
        inputs = SimpleNamespace(
            calibration=images, validation=images, network=self.network, network_key=dict,
            example=lambda: torch.from_numpy(images.pixels[:1]),
        )  # fmt: skip
        if is_new:
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


class Prices(list):
    """Prices by the channels of a layer: only that from 8 to 4 is faster in float; which were asked for.

    Attributes:
        reason: Why there is none from 4 to 4; None if there is one.
    """

    reason = "it does not run"

    def __call__(self, target, groups, cache, **options):
        found = {}
        for block, others in groups.items():
            for other in others:
                self.append(other)
                channels = block.spec.in_channels, block.spec.out_channels
                value = -0.5 if channels == (8, 4) and other.mixed is Arithmetic.FLOAT32 else 0.5
                price = Price(1.0, 1.0, value, value - 0.1, value + 0.1, "ms", 9, Method.WALL_CLOCK)
                found[block, other] = self.reason if self.reason and channels == (4, 4) else price
        return found


@pytest.fixture
def measured(monkeypatch):
    """What is priced."""
    prices = Prices()
    monkeypatch.setattr(mixed, "price_blocks", prices)
    monkeypatch.setattr(mixed._Files, "is_faster", lambda self, kept: True)
    return prices


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


def test_what_the_machine_failed_at_is_tried_in_the_next_run(folder, measured, monkeypatch):
    measured.reason = f"{NOT_MEASURED}no space left"
    run = Run(folder, bench_seconds=2.0)
    run.deploy()
    lacking = read_mixed(run.store)
    assert lacking.unpriced == {"3": dict.fromkeys(mixed._OTHERS, measured.reason)}
    assert any("3 could not be measured in float: no space left; the same command" in n for n in mixed_notes(lacking))

    run.deploy(is_new=False)
    assert len(measured) == 6, "not within the same run"

    with monkeypatch.context() as unchanged:
        unchanged.setattr(mixed.MixSearch, "result", None)  # nothing is searched without new prices
        run.deploy()
    assert len(measured) == 12
    assert read_mixed(run.store) == lacking

    measured.reason = None
    run.deploy()
    assert [layer.name for layer in read_mixed(run.store).layers] == ["0", "2", "3"]
    run.deploy()
    assert len(measured) == 18, "all is known"


def test_mixed_is_for_int8():
    with pytest.raises(UsageError, match="add --precision int8"):
        ConvertOptions(Path("model.pt"), "a:b", "images", mixed="auto")
