"""Real files on emulated cores."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from sepdeploy.bench.arm_cores import find_core
from sepdeploy.bench.arm_counts import count_files, counts_of, is_refused, require_counts
from sepdeploy.bench.arm_cycles import CycleModel
from sepdeploy.bench.arm_guest import (
    INCOMPLETE,
    Block,
    GuestFile,
    Region,
    guest_arguments,
    guest_environment,
    parse_counts,
)
from sepdeploy.bench.arm_root import find_plugin, find_root, missing_tools
from sepdeploy.bench.prefixes import write_prefixes
from sepdeploy.bench.session import open_session
from sepdeploy.cli import main
from sepdeploy.core.measurement import Counts, Method
from sepdeploy.core.progress import Silent
from sepdeploy.errors import ToolError

emulated = pytest.mark.skipif(bool(missing_tools()), reason=f"needs {', '.join(missing_tools())}")

CONV_MACS = 6 * 3 * 9 * 8 * 6
A72 = find_core("cortex-a72")
ADD, SDOT, RESERVED = "91000400", "4e829420", "00000000"


@pytest.fixture(scope="session")
def a72_counts(int8_tflite_file: Path, int8_onnx_file: Path, tmp_path_factory: pytest.TempPathFactory):
    damaged = tmp_path_factory.mktemp("damaged") / "damaged.onnx"
    damaged.write_bytes(b"nothing")
    return count_files(A72, [int8_tflite_file, damaged, int8_onnx_file], Silent(), repeats=10)


@emulated
def test_counts_are_whole_and_labelled(a72_counts) -> None:
    tflite, damaged, onnx = a72_counts
    assert "damaged.onnx" in damaged
    assert is_refused(damaged)
    with pytest.raises(ToolError, match=r"x\.onnx cannot be counted: .*damaged"):
        require_counts([Path("x.onnx")], [damaged])
    for counts, runtime in ((tflite, "ai-edge-litert"), (onnx, "onnxruntime")):
        assert sum(counts.classes.values()) == counts.instructions
        assert CONV_MACS <= counts.macs < 8 * CONV_MACS  # channels are filled up to whole registers
        assert 0 < counts.classes_sum("load") < counts.loaded_bytes < 16 * 4 * counts.classes_sum("load")
        assert counts.stored_bytes >= 6 * 48 + 4
        assert 0 < counts.kcycles_low <= counts.kcycles_high
        assert 0 <= counts.l2_misses <= counts.l1_misses
        assert counts.low_ms == pytest.approx(counts.kcycles_low / 1.5e3)
        assert counts.spread_ratio <= 0.005
        assert "dot" not in counts.classes
        assert counts.method is Method.EMULATED_COUNT
        assert counts.environment.runtime.startswith(runtime)
        assert "emulated by qemu-aarch64 7.2" in counts.environment.cpu


@emulated
def test_another_run_counts_the_same(a72_counts, int8_tflite_file: Path) -> None:
    (again,) = require_counts([int8_tflite_file], count_files(A72, [int8_tflite_file], Silent()))
    assert again.instructions == pytest.approx(a72_counts[0].instructions, rel=0.005)
    assert again.kcycles_low == pytest.approx(a72_counts[0].kcycles_low, rel=0.005)


TWO_THREADS = """
import ctypes, threading, time
syscall = ctypes.CDLL(None).syscall
go_on = True
def spin():
    while go_on:
        sum(range(1000))
def region(function):
    syscall(0x5344, 0)
    function()
    syscall(0x5344, 1)
region(lambda: time.sleep(0.01))
thread = threading.Thread(target=spin)
thread.start()
region(lambda: time.sleep(0.5))
go_on = False
thread.join()
"""


@emulated
def test_what_other_threads_do_does_not_count(tmp_path: Path) -> None:
    root, counts, script = find_root(Silent()) / A72.name, tmp_path / "counts", tmp_path / "script.py"
    script.write_text(TWO_THREADS)
    command = guest_arguments(A72, root, find_plugin(), counts, [])
    command[-1] = str(script)
    subprocess.run(command, env=guest_environment(root), check=True, timeout=120)
    blocks, (alone, beside), has_ended = parse_counts(counts.read_text())
    assert has_ended
    own = [sum(blocks[i].length * count for i, count in region.blocks.items()) for region in (alone, beside)]
    assert alone.elsewhere == 0
    assert beside.elsewhere > 20 * own[1]
    assert own[1] < 5 * own[0]  # for waking up it needs the lock that the other thread holds


@emulated
def test_bench_command_on_a_core(int8_tflite_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--target", "cortex-a76", "--per-layer", "--no-check", "--json"]
    assert main.run(["bench", str(int8_tflite_file), *arguments]) == 0
    ((path, data),) = json.loads(capsys.readouterr().out).items()
    assert path == str(int8_tflite_file)
    assert (data["core"], data["method"]) == ("Cortex-A76", Method.EMULATED_COUNT.value)
    assert data["modelled_ms_low"] == pytest.approx(data["kcycles_low"] / 2.4e3)
    assert data["classes"]["dot"] > 0  # the kernels of this core, which the Cortex-A72 does not have
    layers = data["layers"]
    assert len(layers) > 2
    # Two runs of a file of 14,000 instructions, one of them in bursts, where the call from Python is spread out.
    assert sum(layer["instructions"] for layer in layers) == pytest.approx(data["instructions"], rel=0.1)
    assert sum(layer["kcycles_high"] for layer in layers) == pytest.approx(data["kcycles_high"], rel=0.2)
    (conv,) = (layer for layer in layers if layer["name"].startswith("CONV_2D"))
    assert conv["macs"] == max(layer["macs"] for layer in layers)
    assert conv["macs"] >= CONV_MACS


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--per-layer"], "--per-layer counts on an Arm core: give --target"),
        (["--target", "cortex-a72", "--threads", "2"], "models one core: --threads must be 1, got 2"),
        (["--target", "cortex-a99"], "there is no target 'cortex-a99'; choose one of ort"),
    ],
)
def test_bench_command_refuses(arguments, sentence, tflite_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["bench", str(tflite_file), *arguments]) == 2
    assert sentence in capsys.readouterr().err


def test_repeats_that_differ_are_no_counts(monkeypatch: pytest.MonkeyPatch, onnx_file: Path) -> None:
    from sepdeploy.bench import arm_counts

    block = Block(ADD, {"integer": 1}, 0, 0, 0)
    seen = []

    def guest(core, paths, progress, **options):
        seen.append(options.get("bursts"))
        counts = (1000, 1004) if len(seen) == 1 and paths[0].name == "steady.onnx" else (1000, 1010)
        return [GuestFile(onnx_file, "r", "", tuple(Region({0: n}, 0, 0) for n in counts), (block,)) for _ in paths]

    monkeypatch.setattr(arm_counts, "run_guest", guest)
    monkeypatch.setattr(arm_counts, "require_tools", lambda: None)
    monkeypatch.setattr(arm_counts, "tool_versions", lambda: {"qemu": "7.2"})
    monkeypatch.setattr(arm_counts, "_model", lambda cpu: type("Model", (), {"cycles": lambda self, blocks: 1000.0})())
    (unsteady,) = count_files(A72, [Path("other.onnx")], Silent())
    assert unsteady == "its repeats differ by 1% in instructions, more than 0.5%: it does not do the same each time"
    assert seen == [None, [64]]  # once more, in bursts, before it is given up
    seen.clear()
    (steady,) = count_files(A72, [Path("steady.onnx")], Silent())
    assert isinstance(steady, Counts)
    assert len(seen) == 1


def test_a_network_on_several_threads_is_no_count(monkeypatch: pytest.MonkeyPatch, onnx_file: Path) -> None:
    from sepdeploy.bench import arm_counts

    monkeypatch.setattr(arm_counts, "tool_versions", lambda: {"qemu": "7.2"})
    monkeypatch.setattr(arm_counts, "_model", lambda cpu: type("Model", (), {"cycles": lambda self, blocks: 1.0})())
    block = Block(ADD, {"integer": 1}, 0, 0, 0)

    def counted(*elsewhere: int) -> Counts | str:
        regions = tuple(Region({0: 1000}, 0, 0, each) for each in elsewhere)
        return counts_of(A72, GuestFile(onnx_file, "r", "", regions, (block,)))

    assert counted(500, 500, 500).startswith("other threads execute 50% as much as the one that is counted, in every")
    assert counted(5000, 0, 0).instructions == 1000  # once: something in the background, which is not counted


def test_misses_make_the_high_estimate(monkeypatch: pytest.MonkeyPatch, onnx_file: Path) -> None:
    from sepdeploy.bench import arm_counts

    monkeypatch.setattr(arm_counts, "tool_versions", lambda: {"qemu": "7.2"})
    monkeypatch.setattr(arm_counts, "_model", lambda cpu: type("Model", (), {"cycles": lambda self, blocks: 5000.0})())
    block = Block(ADD * 3, {"integer": 3}, 2, 8, 4)
    counts = counts_of(A72, GuestFile(onnx_file, "r", "", (Region({0: 10}, 100, 7),), (block,)))
    assert (counts.instructions, counts.macs, counts.loaded_bytes, counts.stored_bytes) == (30, 20, 80, 40)
    assert counts.kcycles_low == 5.0
    assert counts.kcycles_high == pytest.approx(5.0 + (100 * A72.l1.miss_cycles + 7 * A72.l2.miss_cycles) / 1e3)


@emulated
def test_the_model_prices_what_is_known_of_the_pipelines() -> None:
    model = CycleModel("cortex-a72")
    assert model.cycles({ADD: 1000}) == pytest.approx(1000, rel=0.1)  # each add waits for the one before
    assert model.cycles({ADD * 4: 1000}) == pytest.approx(4000, rel=0.1)
    assert model.cycles({ADD: 1000, RESERVED: 10}) == pytest.approx(1010, rel=0.1)  # scaled up for what has no model
    with pytest.raises(ToolError, match=r"llvm-mca models only 50\.0% of the executed instructions on cortex-a72"):
        model.cycles({ADD: 10, RESERVED: 10})
    assert CycleModel("neoverse-n1").cycles({SDOT: 1000}) < model.cycles({"4e229420": 1000})  # sdot against mla


@pytest.mark.parametrize("kind", ["onnx", "int8_onnx", "tflite", "int8_tflite"])
def test_prefixes_run_and_end_in_the_file(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    source = request.getfixturevalue(f"{kind}_file")
    prefixes = write_prefixes(source, tmp_path)
    assert prefixes[-1].path == source
    assert len(prefixes) >= 2
    for prefix in prefixes[:-1]:
        session = open_session(prefix.path)
        session.set_random_input(0)
        session.run_once()
    assert "conv" in prefixes[0].name.lower() or "quantize" in prefixes[0].name.lower()


def test_prefixes_hold_the_convolution_with_its_activation(onnx_file: Path, tmp_path: Path) -> None:
    first = write_prefixes(onnx_file, tmp_path)[0]
    assert first.name.startswith("Conv ")
    assert "Relu" in first.name


@pytest.mark.parametrize(
    ("reason", "is_lasting"),
    [
        ("NotImplemented: no such operator", True),
        ("the guest crashed (SIGILL) while it ran 1.onnx", True),
        ("its repeats differ by 1% in instructions, more than 0.5%: it does not do the same each time", False),
        ("the guest crashed (SIGKILL) while it ran 1.onnx", False),
        ("the guest was stopped after 900 s without a result while it ran 1.onnx", False),
        ("OSError: [Errno 28] No space left on device", False),
        ("MemoryError: no message", False),
        ("RuntimeException: std::bad_alloc", False),
        (INCOMPLETE, False),
    ],
)
def test_only_what_is_of_the_file_is_a_refusal(reason: str, is_lasting: bool) -> None:
    assert is_refused(reason) is is_lasting
