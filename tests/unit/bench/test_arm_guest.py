"""What can go wrong around an emulated process, with programs that stand in for it."""

from __future__ import annotations

import errno
import json
import subprocess
import time
from pathlib import Path

import pytest

from sepdeploy.bench import arm_guest, arm_root
from sepdeploy.bench.arm_cores import find_core
from sepdeploy.bench.arm_guest import Region, parse_counts, run_guest
from sepdeploy.core.progress import Silent
from sepdeploy.errors import ToolError

CORE = find_core("cortex-a72")
BLOCK = {"block": 0, "words": "91000400d65f03c0", "classes": {"integer": 1, "branch": 1}, "macs": 0}
BLOCK |= {"loaded_bytes": 0, "stored_bytes": 0}
REGIONS = [
    {"region": i, "blocks": [[0, 5 + i]], "l1_accesses": 9, "l1_misses": 3 + i, "l2_misses": 1} for i in range(5)
]


def report(name: str, regions: int = 5, **more: object) -> str:
    return json.dumps(
        {
            "file": name,
            "threads": 1,
            "burst": 1,
            "warmup": 1,
            "runs_ns": [],
            "regions": regions,
            "runtime": "runtime 1",
            **more,
        }
    )


@pytest.fixture
def guest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Lets a shell script be the emulated process; `$COUNTS` is the file that the plugin would write."""
    view = tmp_path / "root" / CORE.name
    (view / "proc").mkdir(parents=True)
    (view / "proc" / "cpuinfo").touch()
    monkeypatch.setattr(arm_guest, "find_root", lambda progress: tmp_path / "root")
    monkeypatch.setattr(arm_guest, "find_plugin", lambda: tmp_path / "plugin.so")

    def act(*scripts: str, counts: str | None = "", **options):
        left = list(scripts)
        if counts is not None:
            (tmp_path / "counts").write_text(counts)

        def arguments(core, root, plugin, path, options):
            return ["sh", "-c", f"cp {tmp_path / 'counts'} {path} 2>/dev/null; {left.pop(0)}"]

        monkeypatch.setattr(arm_guest, "guest_arguments", arguments)
        files = [tmp_path / "a.onnx", tmp_path / "b.onnx"]
        return run_guest(CORE, files, Silent(), **options)

    return act


def running(pid: str) -> bool:
    """Whether a process is there and not just waiting to be buried."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def lines(*objects: object) -> str:
    return "".join(json.dumps(each) + "\n" for each in objects)


def test_regions_are_without_what_marking_costs(guest) -> None:
    script = f"echo '{report('a')}'; echo '{report('b', 0, error='E: no')}'; echo '{{\"end\": true}}'"
    first, second = guest(script, counts=lines(BLOCK, *REGIONS, {"end": True}))
    assert (first.error, first.runtime) == ("", "runtime 1")
    # The region around nothing after the warm-up had 7 runs of the block and 5 misses.
    assert first.repeats == (Region({0: 1}, 1, 0), Region({0: 2}, 2, 0))
    assert first.blocks[0].length == 2
    assert (second.error, second.repeats) == ("E: no", ())


def test_a_file_that_crashes_the_guest_is_named_and_the_rest_runs(guest) -> None:
    rest = f"echo '{report('b')}'; echo '{{\"end\": true}}'"
    first, second = guest("kill -SEGV $$", rest, counts=lines(BLOCK, *REGIONS, {"end": True}))
    assert first.error == "the guest crashed (SIGSEGV) while it ran a.onnx"
    assert second.error == ""
    _, second = guest(f"echo '{report('a')}'; exit 132", counts=lines(BLOCK, *REGIONS))
    assert second.error == "the guest crashed (SIGILL) while it ran b.onnx"


def test_a_hanging_guest_is_killed_with_its_children(guest, tmp_path: Path) -> None:
    hang = f"sleep 987654 & echo $! > {tmp_path}/pid; wait"
    first, second = guest(hang, hang, counts=lines(BLOCK), still_seconds=0.2)
    assert first.error == "the guest was stopped after 0.2 s without a result while it ran a.onnx"
    assert second.error.endswith("while it ran b.onnx")
    pid = (tmp_path / "pid").read_text().strip()
    limit = time.monotonic() + 30
    while running(pid):  # a signal is sent at once and obeyed a little later
        assert time.monotonic() < limit, "the child of the guest goes on"
        time.sleep(0.01)


def test_counts_that_are_cut_off_are_no_counts(guest) -> None:
    script = f"echo '{report('a')}'; echo '{report('b')}'; echo '{{\"end\": true}}'"
    with pytest.raises(ToolError, match=r"counts of the emulator are incomplete; is the disk of .* full"):
        guest(script, counts=lines(BLOCK, *REGIONS)[:-20])


def test_a_full_disk_is_named(guest, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*given, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(arm_guest.tempfile, "TemporaryDirectory", full)
    with pytest.raises(ToolError, match=r"cannot write to .*: No space left on device; free space there or set TMPDIR"):
        guest("true")


def test_an_emulator_that_does_not_start_says_so(guest) -> None:
    with pytest.raises(ToolError, match=r"does not start with the counting plugin: no such cpu; it takes"):
        guest("echo no such cpu >&2; exit 1", counts=None)


def test_a_root_without_the_cores_cpuinfo_is_refused(guest, tmp_path: Path) -> None:
    (tmp_path / "root" / CORE.name / "proc" / "cpuinfo").unlink()
    with pytest.raises(ToolError, match=r"has no proc/cpuinfo, without which runtimes crash: remove .*built anew"):
        guest("true")


def test_counts_of_a_program_that_was_killed_are_read_up_to_there() -> None:
    blocks, regions, has_ended = parse_counts(lines(BLOCK, REGIONS[0]) + '{"region":1,"blo')
    assert (len(blocks), len(regions), has_ended) == (1, 1, False)


def test_missing_programs_come_with_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(
        ToolError, match=r"qemu-aarch64, .*: apt-get install qemu-user llvm-19 gcc libc6-dev mmdebstrap"
    ):
        arm_root.require_tools()


def test_a_root_that_cannot_be_built_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "mmdebstrap").write_text("#!/bin/sh\necho 'E: no network' >&2\nexit 1\n")
    (tools / "mmdebstrap").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:/usr/bin:/bin")
    monkeypatch.setenv("SEPDEPLOY_ARM64_DIR", str(tmp_path / "arm64"))
    with pytest.raises(ToolError, match=r"the arm64 root cannot be built in .*: E: no network"):
        arm_root.find_root(Silent())
    assert [path.name for path in (tmp_path / "arm64").iterdir()] == ["root.lock"]


def test_a_folder_that_cannot_be_written_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SEPDEPLOY_ARM64_DIR", str(tmp_path / "file"))
    with pytest.raises(ToolError, match=r"cannot write .*file: .*another folder in SEPDEPLOY_ARM64_DIR"):
        arm_root.find_plugin()


def test_every_core_has_a_cpuinfo() -> None:
    from sepdeploy.bench.arm_cores import ARM_CORES
    from sepdeploy.bench.environment import cpu_name

    for core in ARM_CORES.values():
        assert cpu_name(arm_root.arm64_files() / "cpuinfo" / core.name) == core.title


def test_scripts_are_sound() -> None:
    for script in arm_root.arm64_files().glob("*.sh"):
        subprocess.run(["sh", "-n", str(script)], check=True)
