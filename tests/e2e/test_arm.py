"""A conversion whose target is an emulated Arm core."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import sepdeploy
from sepdeploy.bench import arm_counts, arm_numerics
from sepdeploy.bench.arm_guest import GuestFile
from sepdeploy.bench.arm_root import missing_tools
from sepdeploy.cli import main
from sepdeploy.core.artifact import Precision, Role
from sepdeploy.core.measurement import Method
from sepdeploy.render.html import render_html
from sepdeploy.render.summary import summarize, verdict

pytestmark = pytest.mark.skipif(bool(missing_tools()), reason=f"needs {', '.join(missing_tools())}")


@pytest.fixture(scope="module")
def options(workplace):
    return workplace.options(
        "Classifier", model=workplace.trained(), target="cortex-a72:ort", precision=Precision.INT8,
        output=workplace.folder / "arm.sepdeploy",
    )  # fmt: skip


@pytest.fixture(scope="module")
def report(options):
    return sepdeploy.convert(options)


def test_files_are_counted_and_not_timed(report):
    assert [result.latency for result in report.artifacts] == [None] * 4
    for result in report.artifacts:
        assert result.counts.method is Method.EMULATED_COUNT
        assert result.counts.artifact_sha256 == result.artifact.sha256
        assert (result.counts.speedup is None) == (result.artifact.role is Role.ORIGINAL)
    (speed,) = (check for check in report.checks if check.name == "speed")
    assert "modelled cycles" in speed.sentence
    assert "no time was measured" in speed.sentence


def test_nothing_calls_modelled_cycles_a_latency(report):
    (row,) = (row for row in summarize(report) if "cycles" in row.quantity)
    assert row.quantity == "Modelled kcycles (Cortex-A72 (emulated) ONNX Runtime int8, 1 thread), low to high"
    assert " ms" not in row.original + row.converted
    page = render_html(report)
    assert "Modelled cycles" in page
    assert "Latency was not measured: the target is emulated" in page
    assert "modelled cycles" in verdict(report)


def test_every_file_computes_on_the_core_what_it_computes_here(report, options):
    (check,) = (check for check in report.checks if check.name == "numerics")
    assert check.is_met
    assert check.sentence.startswith("all 4 files compute on the emulated Cortex-A72 what this machine computes")
    for result in report.artifacts:
        assert result.numerics.is_same
        assert result.numerics.artifact_sha256 == result.artifact.sha256
    assert len(list((options.output_folder / "work" / "numerics").iterdir())) == 4
    assert check.sentence in render_html(report)


@pytest.fixture
def wrong_core(monkeypatch, report):
    """This machine stands in for the core, and gets int8 sums wrong from the second convolution on."""

    def run_guest(core, paths, progress, *, outputs, seed, **options):
        arm_numerics._run_here(paths, outputs, seed)
        for i, path in enumerate(paths):
            is_prefix = path.stem.startswith("prefix-")
            if path.name == "model.int8.onnx" or (is_prefix and int(path.stem.removeprefix("prefix-")) >= 5):
                with np.load(outputs / f"{i}.npz") as arrays:
                    np.savez(outputs / f"{i}.npz", **{name: each + 0.5 for name, each in arrays.items()})
        return [GuestFile(path, "runtime 1", "") for path in paths]

    counts = {result.artifact.sha256: result.counts for result in report.artifacts}
    monkeypatch.setattr(arm_numerics, "run_guest", run_guest)
    monkeypatch.setattr(
        arm_counts,
        "count_files",
        lambda core, paths, *given, **more: [counts[arm_counts.sha256_of_file(path)] for path in paths],
    )


@pytest.fixture
def again(options, tmp_path):
    """The command line of a conversion that goes on with a copy, in which one file is still to be compared."""
    folder = tmp_path / "again.sepdeploy"
    shutil.copytree(options.output_folder, folder)
    (folder / "work" / "numerics" / "converted.int8.onnx.json").unlink()
    command = ["convert", str(options.model), "--arch", options.arch, "--calibration", options.calibration]
    command += ["--scheme", "depthwise_separable", "--formats", "onnx", "--no-reconstruct"]
    return [*command, "--target", "cortex-a72:ort", "--output", str(folder), "--json"]


def test_a_core_that_computes_something_else_breaks_the_promise(wrong_core, again, capsys):
    assert main.run(again) == 1
    said = json.loads(capsys.readouterr().out)
    (check,) = (check for check in said["checks"] if check["name"] == "numerics")
    assert not check["is_met"]
    assert check["sentence"].startswith("model.int8.onnx computes something else on the Cortex-A72 than here: outputs ")
    assert "; it starts at Conv " in check["sentence"]
    (result,) = (each for each in said["artifacts"] if each["artifact"]["path"] == "model.int8.onnx")
    assert result["numerics"]["starts_at"].startswith("Conv ")


def test_a_conversion_that_is_ended_leaves_nothing(report, again, tmp_path):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "sepdeploy", *again], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env={**os.environ, "TMPDIR": str(scratch)},
    )  # fmt: skip
    try:
        limit = time.monotonic() + 200
        while not (guests := emulators(scratch)):
            assert process.poll() is None, "it ended before it emulated anything"
            assert time.monotonic() < limit, "it never came to emulate anything"
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 128 + signal.SIGTERM
    finally:
        process.kill()
        process.wait()
    limit = time.monotonic() + 30
    while emulators(scratch) or any((Path("/proc") / guest / "cmdline").exists() for guest in guests):
        assert time.monotonic() < limit, "an emulator goes on"
        time.sleep(0.01)  # a signal is sent at once and obeyed a little later
    assert list(scratch.iterdir()) == []
    assert str(tmp_path) not in Path("/proc/mounts").read_text()


def emulators(scratch):
    """Processes that emulate with a file below `scratch`."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            command = (entry / "cmdline").read_bytes() if entry.name.isdigit() else b""
        except OSError:  # it ended
            continue
        if b"qemu-aarch64" in command.split(b"\0")[0] and str(scratch).encode() in command:
            found.append(entry.name)
    return found
