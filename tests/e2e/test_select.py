"""From a checkpoint to a plan that was chosen by measurement, edited, explained and carried out."""

import dataclasses
import json
import shutil

import pytest
import torch

import sepdeploy
import sepdeploy.pipeline
from sepdeploy import pipeline
from sepdeploy.cli.main import run
from sepdeploy.core.codec import read_json
from sepdeploy.core.looser_plan import LooserOutcome
from sepdeploy.core.options import SelectionOptions
from sepdeploy.core.plan import Plan, Reason
from sepdeploy.core.report import Drops
from sepdeploy.core.selection import Selection
from sepdeploy.core.stage_store import StageStore
from sepdeploy.core.training import ReconstructOptions
from sepdeploy.errors import UsageError
from sepdeploy.planning import local_target
from sepdeploy.stages.reopen import read_plan
from sepdeploy.train import reconstruct

QUICK = SelectionOptions(seconds_per_block=0.02)
BRIEF = ReconstructOptions(block_steps=5, network_steps=10, batch_size=32, augment=())


@pytest.fixture(scope="module")
def options(workplace):
    return workplace.options(
        "Classifier", model=workplace.trained(), scheme="auto", selection=QUICK, max_drop_points=5.0,
        output=workplace.folder / "auto.sepdeploy",
    )  # fmt: skip


@pytest.fixture(scope="module")
def planned(options):
    folder = options.output_folder.with_suffix(".plan")
    return sepdeploy.plan(options, folder, front_points=3), folder


def test_the_plan_holds_all_that_was_weighed(planned):
    (weighed, front), folder = planned
    assert read_json(Selection, folder / "plan.json") == weighed
    assert set(weighed.chosen) == {layer.name for layer in weighed.layers}
    layers = [layer for layer in weighed.layers if layer.kept is None]
    assert layers
    for layer in layers:
        assert layer.choices[0].candidate is None
        assert len(layer.choices) > 5
        assert len({choice.candidate.scheme for choice in layer.choices[1:]}) >= 4
        for choice in layer.choices[1:]:
            assert choice.difference_low <= choice.difference <= choice.difference_high
            assert choice.damage >= 0
        least = min(layer.choices[1:], key=lambda choice: choice.macs)
        most = max(layer.choices[1:], key=lambda choice: choice.macs)
        assert least.damage > most.damage
    assert weighed.original_cost > 0
    assert front[0].is_original
    assert sum(point.is_chosen for point in front) == 1
    assert [point.latency for point in front] == sorted((point.latency for point in front), reverse=True)
    assert not list((folder / "search").rglob("*int8*"))  # its files are for float32, and are timed alone


def test_what_was_measured_is_not_measured_again(planned, options, monkeypatch):
    (weighed, _), folder = planned
    monkeypatch.setattr(local_target.LocalTarget, "measure", lambda *_, **__: pytest.fail("priced again"))
    again, front = sepdeploy.plan(options, folder)
    assert again == weighed
    assert not front
    # Another network of the same shapes, in another folder: the prices come from the user's cache.
    other = dataclasses.replace(options, seed=1, max_drop_points=100.0)
    fresh, _ = sepdeploy.plan(other, folder.with_name("other.plan"))
    assert [layer.name for layer in fresh.layers] == [layer.name for layer in weighed.layers]


def test_an_edited_plan_is_carried_out(planned, options, tmp_path):
    (weighed, _), folder = planned
    layer = next(layer for layer in weighed.layers if len(layer.choices) > 1)
    wanted = layer.choices[-1]
    data = json.loads((folder / "plan.json").read_text())
    data["chosen"] = dict.fromkeys(data["chosen"], "dense") | {layer.name: wanted.label}
    (tmp_path / "edited.json").write_text(json.dumps(data))
    given = dataclasses.replace(
        options,
        plan=tmp_path / "edited.json",
        selection=SelectionOptions(),
        max_drop_points=None,
        output=tmp_path / "out",
    )
    report = sepdeploy.convert(given)
    assert list(report.plan.replaced) == [layer.name]
    assert report.plan.replaced[layer.name].form == wanted.candidate.form
    assert report.selection is None
    # The bundle's own plan is one too.
    (tmp_path / "plan.json").write_text((tmp_path / "out" / "plan.json").read_text())
    again = sepdeploy.convert(dataclasses.replace(given, plan=tmp_path / "plan.json", output=tmp_path / "again"))
    assert again.plan.replaced == report.plan.replaced


def test_convert_never_hands_over_what_is_slower(options):
    report = sepdeploy.convert(options)
    speed = next(check for check in report.checks if check.name == "speed")
    assert report.plan.scheme == "auto"
    assert next(check for check in report.checks if check.name == "accuracy").is_met
    if report.plan.replaced:
        assert report.selection.speedup_low > 1
        assert "Chosen by prices measured block by block" in (options.output_folder / "report.html").read_text()
    else:
        assert not speed.is_met
        assert "the files hold the original network" in speed.sentence
    assert read_json(Plan, options.output_folder / "plan.json") == report.plan


def test_a_target_on_which_nothing_is_faster_gets_the_original(options, monkeypatch, tmp_path):
    timed = sepdeploy.pipeline.target_cost

    def slower(results, given):
        latency = timed(results, given)
        if len(results) == 1:
            return latency
        return dataclasses.replace(latency, speedup=0.9, speedup_low=0.8, speedup_high=1.0)

    monkeypatch.setattr(sepdeploy.pipeline, "target_cost", slower)
    report = sepdeploy.convert(dataclasses.replace(options, max_drop_points=100.0, output=tmp_path / "out"))
    assert not report.plan.replaced
    assert not report.is_success
    assert report.selection.given_up
    assert {report.plan.kept[name].reason for name in report.selection.given_up} == {Reason.NOT_FASTER_WHOLE}
    assert any("did not measure faster" in note for note in report.notes)
    assert report.converted_quality.drop_points == 0


def test_the_command_line_plans_and_explains(planned, options, workplace, tmp_path, capsys):
    (weighed, _), folder = planned
    layer = next(layer for layer in weighed.layers if len(layer.choices) > 1)
    assert run(["plan", str(folder), "--explain", layer.name]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert layer.choices[1].label.split()[0][:8] in text
    assert f"{layer.name} becomes" in text or f"{layer.name} stays as it is" in text
    assert run(["plan", str(folder / "plan.json"), "--explain", layer.name, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["name"] == layer.name
    assert run(["plan", str(folder), "--explain", "nothing"]) == 2
    assert "has no layer nothing" in capsys.readouterr().err

    shutil.copytree(folder, tmp_path / "copy")
    arguments = [
        "plan", str(options.model), "--arch", options.arch, "--calibration", options.calibration, "--max-drop", "5",
        "--output", str(tmp_path / "copy"), "--objective", "macs", "--pareto", str(tmp_path / "front.png"),
    ]  # fmt: skip
    assert run(arguments) == 0
    out = capsys.readouterr().out
    assert "Plan for ort float32, 1 thread" in out
    assert (tmp_path / "front.png").read_bytes().startswith(b"\x89PNG")


def test_folders_of_others_are_left_alone(options, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UsageError, match="holds other files"):
        sepdeploy.plan(options, tmp_path)
    with pytest.raises(UsageError, match="chosen by --scheme auto"):
        sepdeploy.plan(dataclasses.replace(options, scheme="low_rank", selection=SelectionOptions()), tmp_path / "new")


class Loosened:
    """A conversion for few MACs whose file is said to lose little at first; what the attempts did."""

    def __init__(self, options, monkeypatch, output, last_drop):
        self.output, self.plans, self.reconstructions, self.failure, self.told = output, [], 0, None, []
        self.target = dataclasses.replace(
            options, output=output, max_drop_points=1.0, recoverable_points=2.0, reconstruct=BRIEF,
            selection=dataclasses.replace(QUICK, goal="macs"),
        )  # fmt: skip
        self._select, self._reconstruct = pipeline.run_selection, reconstruct.reconstruct
        self._drops = iter([0.5, last_drop])
        monkeypatch.setattr(pipeline, "run_selection", self.selected)
        monkeypatch.setattr("sepdeploy.train.reconstruct.reconstruct", self.reconstructed)
        monkeypatch.setattr(pipeline, "measure_drops", lambda *_: Drops(next(self._drops), 0.5, 0.0))
        monkeypatch.setattr(pipeline, "finish_bundle", self.finished)

    def selected(self, *arguments):
        plan, network, record = self._select(*arguments)
        self.plans.append((arguments[6], plan))
        lost = dataclasses.replace(record.quality, drop_points=2.5)  # a looser limit follows from what was lost
        return plan, network, dataclasses.replace(record, quality=lost)

    def reconstructed(self, *arguments, **keywords):
        self.reconstructions += 1
        if self.failure and self.reconstructions == 2:
            raise self.failure
        return self._reconstruct(*arguments, **keywords)

    def finished(self, *arguments):
        self.told.append(arguments[8].looser_plan)
        return arguments[6]  # the network

    def convert(self):
        last = sepdeploy.convert(self.target)
        assert last.name == "reconstructed"
        assert not (self.output / "work" / "aside").exists()
        weights = (self.output / "model.pt").read_bytes()
        assert weights == (self.output / "work" / "reconstructed.pt").read_bytes()
        return read_plan(self.output)[1], weights


@pytest.mark.parametrize(
    ("last_drop", "failure", "outcome"),
    [
        (0.9, None, LooserOutcome.HANDED_OVER),
        (1.1, None, LooserOutcome.OVER_LIMIT),
        (0.9, torch.OutOfMemoryError("CUDA out of memory."), LooserOutcome.FAILED),
    ],
)
def test_room_to_spare_is_used_where_the_promise_still_holds(
    options, tmp_path, monkeypatch, last_drop, failure, outcome
):
    run_ = Loosened(options, monkeypatch, tmp_path / "out", last_drop)
    run_.failure = failure
    plan, weights = run_.convert()
    (first, smaller), (looser, larger), *back = run_.plans
    assert looser == 4.75 > first
    assert macs(larger) < macs(smaller)
    is_kept = outcome is LooserOutcome.HANDED_OVER
    assert plan == (larger if is_kept else smaller)
    assert [limit for limit, _ in back] == ([] if is_kept else [3])
    assert run_.reconstructions == 2
    assert run_.convert() == (plan, weights)
    assert run_.reconstructions == 2, "nothing is left to be done"
    told, again = run_.told
    assert told == again, "the second run says the same"
    assert (told.outcome, told.limit_points, told.held.drop_points) == (outcome, 4.75, 0.5)
    assert told.held.cost - told.found.cost == macs(smaller) - macs(larger)
    assert told.found.drop_points == (None if failure else last_drop)
    assert told.error == ("OutOfMemoryError: CUDA out of memory." if failure else "")


def test_a_run_that_is_killed_on_the_way_back_goes_on_there(options, tmp_path, monkeypatch):
    run_ = Loosened(options, monkeypatch, tmp_path / "out", 1.1)
    with monkeypatch.context() as killed:
        killed.setattr(StageStore, "bring_back", interrupted)
        with pytest.raises(KeyboardInterrupt):
            sepdeploy.convert(run_.target)
    plan, _ = run_.convert()
    assert plan == run_.plans[0][1]
    assert run_.reconstructions == 2


def interrupted(_store):
    raise KeyboardInterrupt


def macs(plan):
    return sum(plan.replaced[d.name].macs if d.name in plan.replaced else d.macs for d in plan.decisions)
