"""The bench program on a board: needs Python 3.10, numpy and the runtime of the files, nothing else.

It times with the same code as on this machine (`timing.py`, `differences.py`), reads its job from `job.json` in the
current folder, and writes lines of JSON to standard output.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sepdeploy.core.passing_errors import is_passing
from sepdeploy.errors import SepdeployError, ToolError

__all__ = ["JOB_FILE", "main"]

JOB_FILE = "job.json"


def main() -> None:
    """Do the job in the current folder; every failure that is foreseen is a line, not a traceback."""
    job: dict[str, Any] = json.loads(Path(JOB_FILE).read_text(encoding="utf-8"))
    try:
        _say("result", **_result(job))
    except SepdeployError as error:
        _say("error", kind=type(error).__name__, message=str(error))


def _say(event: str, **facts: Any) -> None:
    sys.stdout.write(json.dumps({**facts, "event": event}) + "\n")
    sys.stdout.flush()


def _result(job: dict[str, Any]) -> dict[str, Any]:
    from sepdeploy.bench.emulation import emulator

    found = emulator()
    if found is not None and not job["is_emulation_allowed"]:
        return {"emulator": found}
    _require_numpy()
    from sepdeploy.bench.board_state import conditions, read_state
    from sepdeploy.bench.environment import environment

    before = read_state()
    work = {"latencies": _latencies, "differences": _differences, "describe": _versions}[job["work"]]
    outcome = work(job)
    return {
        "emulator": found,
        "environment": asdict(environment("", job["threads"])),
        "conditions": conditions(before, read_state()),
        "outcome": outcome,
    }


def _require_numpy() -> None:
    try:
        import numpy as np  # noqa: F401
    except ImportError as error:
        raise ToolError(f"numpy cannot be imported ({error})") from error


def _versions(_job: dict[str, Any]) -> dict[str, str]:
    """Runtimes that can be imported, by file suffix: name and version."""
    found = {}
    try:
        import onnxruntime

        found[".onnx"] = f"onnxruntime {onnxruntime.__version__}"
    except ImportError:
        pass
    try:
        from sepdeploy.bench.litert import find_interpreter_class

        found[".tflite"] = find_interpreter_class()[1]
    except ToolError:
        pass
    return found


def _latencies(job: dict[str, Any]) -> list[dict[str, Any]]:
    """Latency of whole files; the first is what speed-ups are relative to."""
    from sepdeploy.bench.session import open_session
    from sepdeploy.bench.timing import measure

    sessions = {
        name: open_session(Path(name), threads=job["threads"], is_channels_last=is_channels_last)
        for name, is_channels_last in job["models"]
    }
    reference = next(iter(sessions)) if len(sessions) > 1 else None
    found = measure(sessions, reference=reference, threads=job["threads"], seconds=job["seconds"], seed=job["seed"])
    return [{**asdict(latency), "method": latency.method.value} for latency in found.values()]


def _differences(job: dict[str, Any]) -> list[dict[str, Any]]:
    """Differences of blocks to the first one, or why a block cannot be run and whether that will stay so.

    `is_of_reference` says that the first one cannot be.
    """
    from sepdeploy.bench.differences import measure_differences
    from sepdeploy.bench.session import Session, open_session

    def opened(name: str, is_channels_last: bool) -> Session | dict[str, Any]:
        try:
            session = open_session(Path(name), threads=job["threads"], is_channels_last=is_channels_last)
            session.set_random_input(job["seed"])
        except SepdeployError as error:
            return {"reason": str(error), "is_lasting": not is_passing(error), "is_of_reference": False}
        return session

    reference, *others = (opened(*model) for model in job["models"])
    if isinstance(reference, dict):
        return [{**reference, "is_of_reference": True}] * len(others)
    sessions = [session for session in others if not isinstance(session, dict)]
    found = iter(measure_differences(reference, sessions, seconds=job["seconds"], seed=job["seed"]))
    return [session if isinstance(session, dict) else asdict(next(found)) for session in others]
