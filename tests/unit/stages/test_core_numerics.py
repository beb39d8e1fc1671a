"""What convert hands over is compared on the core that it is for; a stand-in compares here."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from sepdeploy.core.artifact import Artifact, Format, Precision, Role
from sepdeploy.core.measurement import Numerics
from sepdeploy.core.options import ConvertOptions
from sepdeploy.core.progress import Silent
from sepdeploy.core.report import ArtifactResult
from sepdeploy.core.stage_store import StageStore
from sepdeploy.stages import core_numerics as stage
from sepdeploy.stages.core_numerics import numerics_check, numerics_notes


def numerics(sha256: str, difference: float = 1.0, starts_at: str = "") -> Numerics:
    return Numerics("Cortex-A72", difference, 1.0, True, starts_at, "", sha256)


class Bench:
    """Two files of a run for a core."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.compared, self.differences = folder, [], {}
        for name in ("a.onnx", "b.onnx"):
            (folder / name).write_text(name)
        monkeypatch.setattr(stage, "compare_numerics", self.compare)
        monkeypatch.setattr(stage, "find_root", lambda progress: Path("arm64-1"))
        monkeypatch.setattr(stage, "tool_versions", lambda: {"qemu": "7.2"})

    def compare(self, core, paths, progress, *, seed):
        self.compared.append([path.name for path in paths])
        return [numerics(str(path), *self.differences.get(path.name, ())) for path in paths]

    def fail(self, core, paths, progress, *, seed):
        failed = replace(numerics("00", 0.0), failure="OSError: No space left on device")
        return [failed if path.name == "b.onnx" else numerics("00") for path in paths]

    def options(self, target: str) -> ConvertOptions:
        return ConvertOptions(Path("m.pt"), "a:b", "images", target=target, formats=tuple(Format))

    def checks(self, target: str = "cortex-a72:ort"):
        return numerics_check(self.run(target), self.options(target))

    def run(self, target: str = "cortex-a72:ort") -> list[ArtifactResult]:
        roles = {"a.onnx": Role.ORIGINAL, "b.onnx": Role.CONVERTED}
        results = [
            ArtifactResult(
                Artifact.of_file(self.folder / name, format=Format.ONNX, precision=Precision.INT8, role=role),
                None, None, None,
            )
            for name, role in roles.items()
        ]  # fmt: skip
        store = StageStore(self.folder, on_change=lambda: None)
        return stage.compare_on_core(store, results, self.options(target), Silent())


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(tmp_path, monkeypatch)


def test_files_are_compared_once_and_again_when_they_change(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    first = bench.run()
    assert [result.numerics.artifact_sha256 for result in first] == [result.artifact.path for result in first]
    assert bench.run() == first
    assert bench.compared == [["a.onnx", "b.onnx"]]
    (bench.folder / "b.onnx").write_text("other")
    bench.run()
    assert bench.compared[1:] == [["b.onnx"]]
    monkeypatch.setattr(stage, "tool_versions", lambda: {"qemu": "7.3"})
    bench.run()
    bench.run("cortex-a76:ort")
    assert bench.compared[2:] == [["a.onnx", "b.onnx"]] * 2


def test_what_could_not_run_is_tried_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(stage, "compare_numerics", bench.fail)
        (check,) = bench.checks()
    assert check.sentence.endswith("b.onnx does not run on the Cortex-A72: OSError: No space left on device")
    assert [result.numerics.is_same for result in bench.run()] == [True, True]
    assert bench.compared == [["b.onnx"]]
    bench.run()
    assert len(bench.compared) == 1


def test_other_targets_have_nothing_to_compare(bench: Bench) -> None:
    assert [result.numerics for result in bench.run("ort")] == [None, None]
    assert bench.compared == []


def test_a_mismatch_breaks_a_promise_and_names_the_layer(bench: Bench) -> None:
    (met,) = bench.checks()
    assert met.is_met
    assert met.sentence.startswith("all 2 files compute on the emulated Cortex-A72 what this machine computes")
    bench.differences = {"b.onnx": (7.0, "Conv layer3.0")}
    (bench.folder / "b.onnx").write_text("another")
    (broken,) = bench.checks()
    assert (broken.name, broken.is_met) == ("numerics", False)
    assert "b.onnx computes something else on the Cortex-A72 than here" in broken.sentence
    assert "it starts at Conv layer3.0" in broken.sentence
    assert "a.onnx" not in broken.sentence
    assert numerics_check([], bench.options("cortex-a72")) == []


def test_a_file_of_the_other_format_that_does_not_run_there_is_a_note(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def crash(core, paths, progress, *, seed):
        found = [numerics("00"), numerics("11", 0.0)]
        return [found[0], replace(found[1], failure="the guest crashed (SIGILL)")]

    monkeypatch.setattr(stage, "compare_numerics", crash)
    results = bench.run("cortex-a72")
    results[0] = replace(results[0], artifact=replace(results[0].artifact, path="a.tflite", format=Format.TFLITE))
    (check,) = numerics_check(results, bench.options("cortex-a72"))
    assert check.is_met
    assert check.sentence.startswith("the file computes on the emulated Cortex-A72 what this machine computes")
    assert check.sentence.endswith("; 1 file of the other format could not be run there, as the notes say")
    (note,) = numerics_notes(results, bench.options("cortex-a72"))
    assert note.endswith(
        "b.onnx does not run on the Cortex-A72: the guest crashed (SIGILL); cortex-a72 runs tflite files, so no "
        "promise is about it"
    )
    # The same file is what cortex-a72:ort is about.
    (check,) = numerics_check(results, bench.options("cortex-a72:ort"))
    assert not check.is_met
    assert check.sentence.endswith("b.onnx does not run on the Cortex-A72: the guest crashed (SIGILL)")
    assert numerics_notes(results, bench.options("cortex-a72:ort")) == ()


def test_a_file_of_the_other_format_that_computes_something_else_breaks_the_promise(bench: Bench) -> None:
    bench.differences = {"b.onnx": (7.0, "Conv layer3.0")}
    results = bench.run("cortex-a72")  # runs TFLite files; both are ONNX
    (check,) = numerics_check(results, bench.options("cortex-a72"))
    assert not check.is_met
    assert "b.onnx computes something else on the Cortex-A72 than here" in check.sentence
    assert numerics_notes(results, bench.options("cortex-a72")) == ()
