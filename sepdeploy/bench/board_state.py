"""What a board was like while something was timed on it: frequency governor, temperature, throttling, other load."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

__all__ = ["BoardState", "conditions", "read_state"]

_STEADY_GOVERNOR = "performance"
_BUSY_RATIO = 0.5

# What the firmware of a Raspberry Pi says, by bits: now, and since it was started.
_PI_NOW = {
    0: "under-voltage",
    1: "its frequency is capped",
    2: "it is throttled",
    3: "its soft temperature limit holds",
}


@dataclass(frozen=True, slots=True)
class BoardState:
    """A moment of a board; what the system does not tell is None or empty.

    Attributes:
        model: Name of the board.
        governors: Frequency governors in use.
        mhz: Highest frequency of any core at that moment.
        max_mhz: Highest that the processor is made for.
        limit_mhz: Highest that is allowed now.
        temperature_c: Hottest zone.
        throttles: Times that cores were throttled since the start of the system.
        slowed: What slows it down right now.
        load: Processes that wanted to run, on average over the last minute, per core.
    """

    model: str = ""
    governors: tuple[str, ...] = ()
    mhz: float | None = None
    max_mhz: float | None = None
    limit_mhz: float | None = None
    temperature_c: float | None = None
    throttles: int | None = None
    slowed: tuple[str, ...] = ()
    load: float | None = None


def read_state(root: Path = Path("/")) -> BoardState:
    """The state now.

    Args:
        root: What /sys and /proc are below.
    """
    cores = root / "sys" / "devices" / "system" / "cpu"
    frequencies = {
        name: _numbers(cores.glob(f"cpu[0-9]*/cpufreq/{name}"), scale=1e-3)
        for name in ("scaling_cur_freq", "cpuinfo_max_freq", "scaling_max_freq")
    }
    temperatures = _numbers((root / "sys" / "class" / "thermal").glob("thermal_zone*/temp"), scale=1e-3)
    throttles = _numbers(cores.glob("cpu[0-9]*/thermal_throttle/core_throttle_count"))
    return BoardState(
        model=_text(root / "proc" / "device-tree" / "model"),
        governors=tuple(sorted({_text(path) for path in cores.glob("cpu[0-9]*/cpufreq/scaling_governor")} - {""})),
        mhz=max(frequencies["scaling_cur_freq"], default=None),
        max_mhz=max(frequencies["cpuinfo_max_freq"], default=None),
        limit_mhz=max(frequencies["scaling_max_freq"], default=None),
        temperature_c=max((t for t in temperatures if -60 < t < 200), default=None),  # zones without a sensor lie
        throttles=int(sum(throttles)) if throttles else None,
        slowed=(*_cooling(root), *_pi_firmware(root)),
        load=_load(root),
    )


def conditions(before: BoardState, after: BoardState) -> tuple[str, ...]:
    """What to note beside a number, as phrases.

    >>> conditions(BoardState(governors=("ondemand",), temperature_c=41.0), BoardState(temperature_c=63.5))
    ('governor ondemand (not performance: the clock changes with the load)', '41 to 64 C', 'throttling unknown')
    """
    found = [before.model] if before.model else []
    if "dummy-virt" in before.model:  # what QEMU calls its machine
        found.append("a virtual machine: its processor may be emulated")
    if not before.governors:
        found.append("governor unknown")
    elif before.governors == (_STEADY_GOVERNOR,):
        found.append("governor performance")
    else:
        names = " and ".join(before.governors)
        found.append(f"governor {names} (not performance: the clock changes with the load)")
    if after.mhz is not None:
        limit = f" of {after.max_mhz:.0f}" if after.max_mhz is not None else ""
        found.append(f"{after.mhz:.0f}{limit} MHz at the end")
    if before.temperature_c is None or after.temperature_c is None:
        found.append("temperature unknown")
    else:
        found.append(f"{before.temperature_c:.0f} to {after.temperature_c:.0f} C")
    found.append(_throttling(before, after))
    if before.load is not None and before.load > _BUSY_RATIO:
        found.append(f"busy with other work before ({before.load:.1f} processes per core)")
    return tuple(found)


def _throttling(before: BoardState, after: BoardState) -> str:
    reasons = list(dict.fromkeys((*before.slowed, *after.slowed)))
    is_known = bool(reasons) or after.throttles is not None or after.limit_mhz is not None
    if before.throttles is not None and after.throttles is not None and after.throttles > before.throttles:
        reasons.append(f"cores were throttled {after.throttles - before.throttles} times")
    if after.limit_mhz is not None and after.max_mhz is not None and after.limit_mhz < after.max_mhz:
        reasons.append(f"the clock is limited to {after.limit_mhz:.0f} MHz")
    if reasons:
        return f"THROTTLED: {', '.join(reasons)}"
    return "not throttled" if is_known else "throttling unknown"


def _cooling(root: Path) -> tuple[str, ...]:
    """Cooling devices that lower the processor's clock, where they are at work."""
    at_work = []
    for device in (root / "sys" / "class" / "thermal").glob("cooling_device*"):
        kind = _text(device / "type")
        state = _numbers([device / "cur_state"])
        if re.search(r"cpufreq|processor", kind, re.IGNORECASE) and state and state[0] > 0:
            at_work.append(f"cooling by {kind}")
    return tuple(dict.fromkeys(at_work))


def _pi_firmware(root: Path) -> tuple[str, ...]:
    text = _text(root / "sys" / "devices" / "platform" / "soc" / "soc:firmware" / "get_throttled")
    try:
        bits = int(text, 16) if text else 0
    except ValueError:
        return ()
    return tuple(meaning for bit, meaning in _PI_NOW.items() if bits >> bit & 1)


def _load(root: Path) -> float | None:
    found = re.match(r"[0-9.]+", _text(root / "proc" / "loadavg"))
    return float(found[0]) / (os.cpu_count() or 1) if found else None


def _numbers(paths: Iterable[Path], scale: float = 1.0) -> list[float]:
    found = []
    for path in paths:
        try:
            found.append(int(_text(path)) * scale)
        except ValueError:
            continue
    return found


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8", "replace").strip("\0\n ")
    except OSError:
        return ""
