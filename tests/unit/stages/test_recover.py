"""What the steps after the transfer are judged by, and what their files are good for."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from sepdeploy.analyze.trace import trace_network
from sepdeploy.core.options import ConvertOptions
from sepdeploy.core.plan import SchemeOptions
from sepdeploy.core.progress import Silent
from sepdeploy.core.stage_store import StageStore, locked
from sepdeploy.core.training import RecoveryStep, TrainOptions
from sepdeploy.data.images import open_images
from sepdeploy.errors import UsageError
from sepdeploy.planning.candidates import propose_plan
from sepdeploy.planning.convert import convert_network
from sepdeploy.stages.bundle import save_weights
from sepdeploy.stages.guard import TRANSFERRED
from sepdeploy.stages.launch import Processes
from sepdeploy.stages.load import Inputs
from sepdeploy.stages.recover import Recovered, Recovery, Weights, training_images
from sepdeploy.stages.report import _recovery_notes
from sepdeploy.train.hooks import hook_of


def build(tmp_path, images: int = 16, training_seed: int = 0) -> tuple[Recovery, Recovered]:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(32, 4)).eval()
    np.savez(tmp_path / "images.npz", images=np.random.default_rng(0).integers(0, 256, (images, 6, 6, 3), np.uint8))
    calibration = open_images(str(tmp_path / "images.npz"), role="calibration")
    source = SimpleNamespace(spec="net.py:net", sha256="0")
    inputs = Inputs(network, source, "0", calibration, calibration, None, ())
    traced = trace_network(network, inputs.example())
    plan = propose_plan(traced, "depthwise_separable", SchemeOptions(terms=1))
    converted, _ = convert_network(network, traced, plan, list, method="data-free")
    folder = tmp_path / "bundle"
    (folder / "work").mkdir(parents=True, exist_ok=True)
    options = ConvertOptions(
        model=tmp_path, arch="net.py:net", calibration="images.npz", output=folder,
        training=TrainOptions(seed=training_seed),
    )  # fmt: skip
    store = StageStore(folder, on_change=lambda: None)
    recovery = Recovery(store, folder, options, inputs, traced, plan, Silent(), Processes())
    save_weights(folder / "work" / f"{TRANSFERRED}.pt", converted)
    return recovery, recovery.open(TRANSFERRED)


def identity(model, teacher, context):
    return model


def test_a_quarter_of_the_calibration_images_judges_and_is_not_computed_on(tmp_path):
    recovery, _ = build(tmp_path)
    assert (len(recovery.fit), len(recovery.held_out)) == (12, 4)
    fit, held_out = (next(images.batches(16))[0] for images in (recovery.fit, recovery.held_out))
    assert not any((image == fit).all(axis=(1, 2, 3)).any() for image in held_out)


def test_training_images_are_judged_by_some_of_their_own(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (200, 8, 8, 3), dtype=np.uint8)
    np.savez(tmp_path / "train.npz", images=pixels)
    images = open_images(str(tmp_path / "train.npz"), role="calibration")
    held_out = images.head(5)
    own, judges = training_images(images, held_out, seed=0)
    assert (len(own), len(judges)) == (180, 20)
    seen = np.concatenate([next(part.batches(200))[0] for part in (own, judges)])
    assert len(np.unique(seen.reshape(200, -1), axis=0)) == 200
    few = images.head(50)
    assert training_images(few, held_out, seed=0) == (few, held_out)


@pytest.mark.parametrize("images", [1, 3])
def test_too_few_images_do_both_and_the_report_says_so(tmp_path, images):
    recovery, start = build(tmp_path, images)
    assert len(recovery.fit) == len(recovery.held_out) == images
    steps = recovery.run_hook(start, hook_of(identity)).steps
    inputs = SimpleNamespace(calibration=recovery.fit)
    (note,) = _recovery_notes(inputs, steps)
    assert note.startswith(f"only {images} calibration image")
    assert _recovery_notes(SimpleNamespace(calibration=range(16)), steps) == ()


def test_a_step_that_made_it_worse_and_was_kept_is_noted():
    step = RecoveryStep("hook", 0.1, 0.2, 4, is_kept=True)
    (note,) = _recovery_notes(SimpleNamespace(calibration=range(16)), (step,))
    assert "after the step 'hook' the outputs are further from the original's" in note
    assert _recovery_notes(SimpleNamespace(calibration=range(16)), (replace(step, is_kept=False),)) == ()


def test_steps_follow_one_another_and_depend_on_what_came_before(tmp_path):
    recovery, start = build(tmp_path)
    calls = []

    def spoil(model, teacher, context):
        calls.append(len(calls))
        with torch.no_grad():
            model[4].bias[0] += 5
        return model

    hook = replace(hook_of(spoil), key={"name": "spoil"})
    first = recovery.run_hook(start, hook)
    assert recovery.run_hook(start, hook).steps == first.steps
    assert calls == [0]
    assert first.steps[0].damage_after > first.steps[0].damage_before
    adopted = recovery.adopt(start, Weights(first.network, "test"))
    last = recovery.run_hook(adopted, hook)
    assert calls == [0, 1]
    assert [step.name for step in last.steps] == ["adopted", "hook"]
    torch.testing.assert_close(last.network[4].bias[0], start.network[4].bias[0] + 10)
    save_weights(tmp_path / "bundle" / "work" / f"{TRANSFERRED}.pt", first.network)
    recovery.run_hook(recovery.open(TRANSFERRED), hook)
    assert calls == [0, 1, 2]
    recovery.finish(last)
    assert (tmp_path / "bundle" / "model.pt").read_bytes() == (tmp_path / "bundle/work/hooked.pt").read_bytes()


def test_the_seed_of_the_training_is_the_hooks(tmp_path):
    seeds = []

    def record(model, teacher, context):
        seeds.append(context.seed)
        return model

    hook = replace(hook_of(record), key={"name": "record"})
    for seed in (0, 5, 5):
        recovery, start = build(tmp_path, training_seed=seed)
        recovery.run_hook(start, hook)
    assert seeds == [0, 5]


def test_what_a_killed_training_left_is_removed(tmp_path):
    with locked(tmp_path):
        pass
    for name in ("finetune", "hook"):
        (tmp_path / "work" / name).mkdir()
        (tmp_path / "work" / name / ".checkpoint.77.tmp.pt").touch()
        (tmp_path / "work" / name / "checkpoint.pt").touch()
    with locked(tmp_path):
        left = sorted(path.name for name in ("finetune", "hook") for path in (tmp_path / "work" / name).iterdir())
    assert left == ["checkpoint.pt", "checkpoint.pt"]


def test_a_network_that_was_changed_is_not_opened_again(tmp_path):
    recovery, start = build(tmp_path)
    last = recovery.run_hook(start, hook_of(identity))
    assert recovery.reopen(last.name).steps == last.steps
    save_weights(tmp_path / "bundle" / "work" / f"{last.name}.pt", start.network.double())
    with pytest.raises(UsageError, match="has changed; run 'sepdeploy convert' again"):
        recovery.reopen(last.name)
