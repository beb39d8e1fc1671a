"""Reconstruction within `convert`, then `sepdeploy finetune` on the bundle: in one process and in two."""

import importlib
import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

import sepdeploy
from sepdeploy import pipeline
from sepdeploy.cli.main import run
from sepdeploy.core.codec import read_json, to_data, write_json
from sepdeploy.core.looser_plan import LooserOutcome, LooserPlan, TriedPlan
from sepdeploy.core.manifest import RunRecord
from sepdeploy.core.plan import SchemeOptions
from sepdeploy.core.report import Drops
from sepdeploy.core.training import ReconstructOptions, TrainOptions
from sepdeploy.errors import UsageError
from sepdeploy.stages.bundle import read_weights

BRIEF = ReconstructOptions(block_steps=10, network_steps=30, batch_size=32, augment=())
TRAINING = (
    "--epochs", "6", "--batch-size", "32", "--learning-rate", "1e-3", "--ema", "0", "--train-augment", "none",
    "--batch-norm", "frozen",
)  # fmt: skip


@pytest.fixture(scope="module")
def options(workplace):
    return workplace.options(
        "Classifier",
        model=workplace.trained(),
        validation=workplace.images(),
        scheme_options=SchemeOptions(terms=1),
        reconstruct=BRIEF,
        max_drop_points=60.0,
    )


@pytest.fixture(scope="module")
def conversion(options):
    return sepdeploy.convert(options), options.output_folder


@pytest.fixture
def bundle(conversion, tmp_path):
    shutil.copytree(conversion[1], tmp_path / "bundle")
    return tmp_path / "bundle"


TRACED = """
import importlib, os, sys
from contextlib import contextmanager
from pathlib import Path

from sepdeploy import pipeline
from sepdeploy.cli.main import run

folder, *arguments = sys.argv[1:]
training = importlib.import_module("sepdeploy.train.finetune")
join, make = pipeline.joined_processes, training.make_accelerator

@contextmanager
def joined_processes():
    with join() as processes:
        Path(folder, f"joined as {processes.rank} of {processes.count}").touch()
        yield processes

def make_accelerator(precision):
    made = make(precision)
    Path(folder, f"trained as {made.process_index} of {made.num_processes} on {made.device.type}").touch()
    return made

pipeline.joined_processes, training.make_accelerator = joined_processes, make_accelerator
sys.exit(run(arguments))
"""
"""`sepdeploy`, leaving a file for each process that takes part."""


@pytest.fixture
def traced(tmp_path):
    """The program, its folder of traces, and the environment of its processes."""
    (tmp_path / "traced.py").write_text(TRACED)
    (tmp_path / "traces").mkdir()
    return [str(tmp_path / "traced.py"), str(tmp_path / "traces")], tmp_path / "traces"


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": free_port(), **more}  # fmt: skip


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_reconstruction_is_measured_recorded_and_used(conversion, options):
    report, bundle = conversion
    assert report.guard_limit_points == 63
    assert report.recovery[-1].name == "reconstruction"
    assert all(step.images == 32 for step in report.recovery)
    assert report.recovery[-1].is_kept
    assert report.recovery[-1].damage_after < report.recovery[-1].damage_before
    assert report.converted_quality.relative_error < report.transferred_quality.relative_error
    page = (bundle / "report.html").read_text()
    assert "reconstruction" in page
    assert "63.00 points there is taken back" in page
    manifest = json.loads((bundle / "manifest.json").read_bytes())
    assert "options.json" in manifest["files"]
    record = json.loads((bundle / "options.json").read_bytes())
    assert record["untrained"] == "reconstructed"
    assert record["options"]["model"] == str(options.model)


def test_repeating_the_conversion_trains_nothing_and_without_reconstruction_it_is_left_out(
    conversion, options, bundle, monkeypatch
):
    before = (bundle / "model.pt").stat().st_mtime_ns
    monkeypatch.setattr("sepdeploy.train.reconstruct.reconstruct", None)
    sepdeploy.convert(replace(options, output=bundle))
    assert (bundle / "model.pt").stat().st_mtime_ns == before
    report = sepdeploy.convert(replace(options, output=bundle, reconstruct=None))
    assert "reconstruction" not in [step.name for step in report.recovery]
    assert report.guard_limit_points == 60
    assert read_weights(bundle / "model.pt").keys() == read_weights(conversion[1] / "model.pt").keys()
    assert (bundle / "model.pt").read_bytes() != (conversion[1] / "model.pt").read_bytes()


def test_finetune_goes_on_from_the_bundle_and_convert_goes_back(workplace, options, conversion, bundle, capfd):
    untouched = [bundle / "plan.json", bundle / "work" / "transferred.pt", bundle / "work" / "reconstructed.pt"]
    before = [path.stat().st_mtime_ns for path in untouched]
    tried = TriedPlan("MACs", 10.0, 8.0), TriedPlan("MACs", 10.0, 5.0, drop_points=61.0)
    looser = LooserPlan(LooserOutcome.OVER_LIMIT, 60.0, 70.0, *tried)
    write_json(bundle / "options.json", replace(read_json(RunRecord, bundle / "options.json"), looser_plan=looser))
    arguments = ["finetune", str(bundle), "--train", workplace.images(count=256), *TRAINING]
    assert run([*arguments, "--json"]) in (0, 1)  # 1: too briefly timed to be sure of the speed
    report = json.loads(capfd.readouterr().out)
    assert report["looser_plan"] == to_data(looser)
    assert [path.stat().st_mtime_ns for path in untouched] == before
    assert [step["name"] for step in report["recovery"]][-2:] == ["reconstruction", "fine-tuning"]
    assert report["recovery"][-1]["damage_after"] < report["recovery"][-1]["damage_before"]
    command = f"sepdeploy finetune {bundle} --train {workplace.images(count=256)} {' '.join(TRAINING)} --json"
    assert report["command"].endswith(f" && {command}")
    assert any("128 images of --train are validation images too" in note for note in report["notes"])
    epochs = [json.loads(line) for line in (bundle / "work" / "finetune" / "metrics.jsonl").read_text().splitlines()]
    assert [epoch["epoch"] for epoch in epochs] == [1, 2, 3, 4, 5, 6]
    assert sepdeploy.load(bundle)
    trained = (bundle / "model.pt").read_bytes()
    assert trained == (bundle / "work" / "finetuned.pt").read_bytes() != (conversion[1] / "model.pt").read_bytes()

    assert run(arguments) in (0, 1)
    printed = capfd.readouterr().out
    assert "fine-tuning" in printed
    for text in (printed, (bundle / "report.html").read_text()):
        assert "so a cheaper plan was tried: 2.00x fewer MACs" in text
    assert (bundle / "model.pt").read_bytes() == trained
    assert sepdeploy.convert(replace(options, output=bundle)).looser_plan is None
    assert (bundle / "model.pt").read_bytes() == (conversion[1] / "model.pt").read_bytes()


@pytest.fixture
def unexported(monkeypatch):
    monkeypatch.setattr(pipeline, "finish_bundle", lambda *arguments: arguments[6])  # the trained network


def test_a_run_stopped_in_the_training_goes_on_there(workplace, options, tmp_path, monkeypatch, unexported):
    target = replace(options, train=workplace.images(count=256), training=TrainOptions(epochs=1, batch_size=64),
                     output=tmp_path / "out")  # fmt: skip
    with monkeypatch.context() as stopped:
        stopped.setattr("sepdeploy.train.finetune.finetune", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            sepdeploy.convert(target)
    assert not (tmp_path / "out" / "model.pt").exists()
    with monkeypatch.context() as resumed:
        resumed.setattr("sepdeploy.train.reconstruct.reconstruct", None)  # not called again
        last = sepdeploy.convert(target)
    assert [step.name for step in last.steps][-2:] == ["reconstruction", "fine-tuning"]


def _interrupted(*arguments, **options):
    raise KeyboardInterrupt


@pytest.mark.parametrize("drop", [60.5, 90.0])  # as of an int8 file that nothing, or hardly anything, can save
def test_a_promise_that_recovery_does_not_keep_is_tried_without(options, tmp_path, monkeypatch, unexported, drop):
    attempts, reconstructions = [], []
    guard, reconstruct = pipeline.run_guard, importlib.import_module("sepdeploy.train.reconstruct").reconstruct

    def watched_guard(*arguments):
        attempts.append(arguments[7])
        return guard(*arguments)

    def counted(*arguments, **keywords):
        reconstructions.append(len(attempts))
        return reconstruct(*arguments, **keywords)

    monkeypatch.setattr(pipeline, "run_guard", watched_guard)
    monkeypatch.setattr("sepdeploy.train.reconstruct.reconstruct", counted)
    monkeypatch.setattr(pipeline, "measure_drops", lambda *_: Drops(file=drop, network=drop, original_file=0.0))
    last = sepdeploy.convert(replace(options, output=tmp_path / "out"))
    given_up = attempts.index(60)
    assert attempts[0] == 63
    assert given_up == (3 if drop < 61 else 2), "after three attempts, or as soon as nothing was left to be replaced"
    assert all(limit < 60 for limit in (*attempts[1:given_up], *attempts[given_up + 1 :]))
    assert reconstructions
    assert max(reconstructions) <= given_up
    # Broken after three attempts without, too: then rather with what was won back. Or nothing was left to be replaced.
    goes_back = len(attempts) == given_up + 4
    assert goes_back == (last.name == "reconstructed")
    assert not goes_back or attempts[-1] == attempts[given_up - 1]


def test_moved_inputs_are_asked_for_and_found(workplace, conversion, bundle, tmp_path, capfd, unexported):
    data = json.loads((bundle / "options.json").read_bytes())
    data["options"]["model"] = str(tmp_path / "gone.pt")
    (bundle / "options.json").write_text(json.dumps(data))
    arguments = ["finetune", str(bundle), "--train", workplace.images(count=256), *TRAINING]
    assert run(arguments) == 2
    assert f"gone.pt is gone since {bundle} was made; say with --model where it is now" in capfd.readouterr().err
    shutil.copy(workplace.trained(), tmp_path / "elsewhere.pt")
    moved = sepdeploy.MovedInputs(model=tmp_path / "elsewhere.pt")
    last = sepdeploy.finetune(
        bundle, workplace.images(count=256), training=TrainOptions(epochs=1, batch_size=64), moved=moved
    )
    assert last.steps[-1].name == "fine-tuning"


def test_another_checkpoint_or_plan_is_refused(workplace, bundle):
    network = workplace.network("Classifier")
    torch.save(network.state_dict(), bundle.parent / "other.pt")
    with pytest.raises(UsageError, match=r"no longer what .* was made with; run its 'sepdeploy convert' again"):
        sepdeploy.finetune(
            bundle, workplace.images(count=256), moved=sepdeploy.MovedInputs(model=bundle.parent / "other.pt")
        )
    with (bundle / "plan.json").open("ab") as file:
        file.write(b"\n")
    with pytest.raises(UsageError, match=r"the plan or its weights in .* have changed"):
        sepdeploy.finetune(bundle, workplace.images(count=256))


def test_a_bundle_can_be_moved_and_its_record_is_absolute(conversion, monkeypatch, tmp_path):
    from sepdeploy.core.codec import read_json

    options = read_json(RunRecord, conversion[1] / "options.json").options
    assert options.model.is_absolute()
    assert options.arch.startswith("/")
    assert options.output is None


def test_two_processes_train_as_one_and_the_first_alone_speaks(workplace, bundle, tmp_path, traced):
    program, traces = traced
    shutil.copytree(bundle, tmp_path / "alone")
    arguments = ["--train", workplace.images(count=256), *TRAINING, "--json"]
    launcher = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
                "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", free_port()]  # fmt: skip
    done = subprocess.run(
        [sys.executable, *launcher, *program, "finetune", str(bundle), *arguments],
        capture_output=True, text=True, timeout=300, env=environment(), check=False,
    )  # fmt: skip
    assert names(traces) == [
        "joined as 0 of 2", "joined as 1 of 2", "trained as 0 of 2 on cpu", "trained as 1 of 2 on cpu",
    ], done.stderr  # fmt: skip
    assert "sepdeploy: " not in done.stderr
    report = json.loads(done.stdout)  # one report, nothing else
    assert report["recovery"][-1]["name"] == "fine-tuning"
    assert report["recovery"][-1]["is_kept"]
    assert (bundle / "model.pt").read_bytes() != (bundle / "work" / "reconstructed.pt").read_bytes()
    run(["finetune", str(tmp_path / "alone"), *arguments])
    together, alone = (read_weights(folder / "model.pt") for folder in (bundle, tmp_path / "alone"))
    for name, value in alone.items():
        torch.testing.assert_close(together[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [(("--train", "nowhere"), "nowhere does not exist"), (("--finetune-hook", "gone.py:train"), "gone.py")],
)
def test_when_the_first_process_fails_none_hangs_and_it_alone_speaks(bundle, traced, wrong, message):
    program, traces = traced
    shared = environment(WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")  # no launcher that would kill the second process
    both = [
        subprocess.Popen(
            [sys.executable, *program, "finetune", str(bundle), *wrong, "--json"], text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**shared, "RANK": rank, "LOCAL_RANK": rank},
        )
        for rank in "01"
    ]  # fmt: skip
    try:
        (_, first), (_, second) = (process.communicate(timeout=120) for process in both)
    finally:
        for process in both:
            process.kill()
    assert names(traces) == ["joined as 0 of 2", "joined as 1 of 2"], first + second
    assert [process.returncode for process in both] == [2, 4]
    assert message in first
    assert (first.count("sepdeploy: "), second.count("sepdeploy: ")) == (1, 0)
    assert "Traceback" not in first + second
    assert (bundle / "manifest.json").exists()


def test_an_attempt_is_not_remembered_for_a_hook_that_nobody_can_tell_from_another(options, tmp_path, unexported):
    def convert(hook):
        sepdeploy.convert(replace(options, reconstruct=None, output=tmp_path / "out"), finetune=hook)
        return len(calls)

    calls = []

    def closure():
        def train(model, teacher, context):
            calls.append(context)
            return model

        return train

    assert convert(closure()) == 1
    path = tmp_path / "out" / "work" / "limit.json"
    limit = json.loads(path.read_bytes())
    limit["attempt"]["is_recovering"] = False  # as if the first one had not kept the promise
    path.write_text(json.dumps(limit))
    assert convert(closure()) == 2


def test_convert_does_not_train_in_several_processes(workplace, options, monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    trained = replace(options, train=workplace.images(count=256), output=tmp_path / "out")
    with pytest.raises(UsageError, match="accelerate launch -m sepdeploy finetune BUNDLE"):
        sepdeploy.convert(trained)
    assert not (tmp_path / "out").exists()


def test_nothing_replaced_is_nothing_to_train(workplace, tmp_path):
    options = workplace.options("AllPointwise", output=tmp_path / "out")
    sepdeploy.convert(options)
    with pytest.raises(UsageError, match="nothing was replaced, so there is nothing to train"):
        sepdeploy.finetune(tmp_path / "out", workplace.images(count=256))
    with pytest.raises(UsageError, match="there is nothing to train: give images"):
        sepdeploy.finetune(tmp_path / "out")
