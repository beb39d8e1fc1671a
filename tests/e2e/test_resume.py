"""Runs that are killed, stopped or started twice, and bundles that must outlive a failed run."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest

import sepdeploy
from sepdeploy.cli.main import run
from sepdeploy.core.artifact import Format
from sepdeploy.core.stage_store import locked
from sepdeploy.errors import UsageError

RESULTS = ("plan.json", "model.pt", "model.onnx", "model.int8.onnx", "original/model.onnx", "original/model.int8.onnx")


@pytest.fixture(scope="module")
def arguments(workplace):
    labelled = workplace.images(count=512, labels="Classifier")
    return [
        "convert", str(workplace.checkpoint("Classifier")), "--arch", workplace.arch("Classifier"),
        "--calibration", labelled, "--validation", labelled, "--max-drop", "3", "--formats", "onnx", "--no-reconstruct",
        "--scheme", "depthwise_separable",
    ]  # fmt: skip


def start(arguments, output) -> subprocess.Popen:
    # A handler, for what is ignored here, as in a job in the background, the child would ignore as well.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(
            [sys.executable, "-m", "sepdeploy", *arguments, "--output", str(output)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
    finally:
        signal.signal(signal.SIGINT, before)


def wait_for(path, process) -> None:
    deadline = time.monotonic() + 120
    while not path.exists():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.002)


def kill_when(path, arguments, output) -> None:
    process = start(arguments, output)
    try:
        wait_for(path, process)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == -signal.SIGKILL


def hashes(folder) -> dict[str, str]:
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in RESULTS}


def temporaries(folder) -> list:
    return list(folder.rglob(".*"))


def convert_briefly(workplace, output) -> None:
    """What `arguments` ask for, without the 2 s of timing per file."""
    labelled = workplace.images(count=512, labels="Classifier")
    options = workplace.options(
        "Classifier", calibration=labelled, validation=labelled, max_drop_points=3.0, output=output
    )
    sepdeploy.convert(options)


@pytest.fixture(scope="module")
def undisturbed(workplace, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed") / "bundle"
    convert_briefly(workplace, folder)
    return folder


def test_killed_runs_go_on_and_end_the_same(workplace, arguments, undisturbed, tmp_path):
    output = tmp_path / "bundle"
    kill_when(output / "work" / "guard_memory.json", arguments, output)
    assert not (output / "work" / "transferred.pt").exists()
    measured = json.loads((output / "work" / "guard_memory.json").read_bytes())
    assert measured["damages"] or measured["steps"]

    kill_when(output / "model.pt", arguments, output)
    assert not (output / "model.onnx").exists()
    assert not (output / "manifest.json").exists()
    remembered = json.loads((output / "work" / "guard_memory.json").read_bytes())
    assert remembered["steps"].items() >= measured["steps"].items()
    with pytest.raises(UsageError, match="no finished bundle"):
        sepdeploy.load(output)

    for folder in (output, output / "original", output / "work"):  # as a kill in the middle of a write leaves them
        (folder / ".model.99999.tmp.onnx").write_bytes(b"half")
    convert_briefly(workplace, output)
    assert hashes(output) == hashes(undisturbed)
    assert temporaries(output) == []
    steps = [json.loads((folder / "work" / "guard.json").read_bytes())["steps"] for folder in (output, undisturbed)]
    assert steps[0] == steps[1]


def test_interrupt_is_one_sentence_and_exit_130(arguments, tmp_path):
    output = tmp_path / "bundle"
    process = start(arguments, output)
    wait_for(output / "work" / "trace.json", process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err.strip() == "sepdeploy: stopped; finished stages are kept, run the same command again to go on"
    assert out == ""
    assert temporaries(output) == []
    assert not (output / "manifest.json").exists()


def test_a_killed_start_does_not_lock_the_folder_out(arguments, tmp_path):
    (tmp_path / "bundle" / "work").mkdir(parents=True)
    with locked(tmp_path / "bundle"):
        pass


def test_second_run_into_the_same_folder_is_refused(arguments, undisturbed, capsys):
    before = (undisturbed / "work" / "stages.json").read_bytes()
    with locked(undisturbed):
        assert run([*arguments, "--output", str(undisturbed)]) == 2
    assert "another run is writing to" in capsys.readouterr().err
    assert (undisturbed / "work" / "stages.json").read_bytes() == before


@pytest.mark.parametrize("name", ["ReturnsNan", "Dynamic", "SingleImages"])
def test_a_failed_run_does_not_harm_a_finished_bundle(workplace, undisturbed, name):
    before = {path: path.read_bytes() for path in undisturbed.rglob("*") if path.is_file() and "work" not in path.parts}
    options = workplace.options(name, output=undisturbed)
    with pytest.raises(sepdeploy.errors.SepdeployError):
        sepdeploy.convert(options)
    after = {path: path.read_bytes() for path in undisturbed.rglob("*") if path.is_file() and "work" not in path.parts}
    assert after == before
    assert sepdeploy.load(undisturbed)


def test_a_changed_option_makes_the_files_anew_and_drops_stale_ones(workplace, tmp_path):
    options = workplace.options("Classifier", output=tmp_path / "bundle")
    sepdeploy.convert(options)
    stale = tmp_path / "bundle" / "model.tflite"
    stale.write_bytes(b"of an earlier run with both formats")
    before = hashes(options.output_folder)
    sepdeploy.convert(replace(options, scheme="spatial_separable", formats=(Format.ONNX,)))
    after = hashes(options.output_folder)
    assert {name for name in RESULTS if before[name] != after[name]} == {
        "plan.json", "model.pt", "model.onnx", "model.int8.onnx",
    }  # fmt: skip
    assert not stale.exists()


def test_damaged_intermediate_files_are_made_again(workplace, tmp_path):
    options = workplace.options("Classifier", output=tmp_path / "bundle", max_drop_points=50.0)
    sepdeploy.convert(options)
    before = hashes(options.output_folder)
    for name in ("work/stages.json", "work/guard_memory.json", "work/trace.json", "model.onnx", "model.pt"):
        os.truncate(options.output_folder / name, 10)
    with pytest.raises(UsageError, match="not the file that"):
        sepdeploy.load(options.output_folder)
    sepdeploy.convert(options)
    assert hashes(options.output_folder) == before
    assert sepdeploy.load(options.output_folder)
