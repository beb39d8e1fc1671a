from __future__ import annotations

from pathlib import Path

from sepdeploy.bench.board_state import BoardState, conditions, read_state

PI = {
    "proc/device-tree/model": "Raspberry Pi 4 Model B Rev 1.4\0",
    "proc/loadavg": "0.00 0.01 0.05 1/100 999",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_governor": "ondemand\n",
    "sys/devices/system/cpu/cpu1/cpufreq/scaling_governor": "ondemand\n",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "600000",
    "sys/devices/system/cpu/cpu1/cpufreq/scaling_cur_freq": "1500000",
    "sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq": "1800000",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_max_freq": "1800000",
    "sys/class/thermal/thermal_zone0/temp": "48312",
    "sys/class/thermal/thermal_zone1/temp": "-274000",  # a sensor that is not there
    "sys/class/thermal/cooling_device0/type": "cpufreq-cpu0",
    "sys/class/thermal/cooling_device0/cur_state": "0",
    "sys/class/thermal/cooling_device1/type": "pwm-fan",
    "sys/class/thermal/cooling_device1/cur_state": "3",
    "sys/devices/platform/soc/soc:firmware/get_throttled": "50000",  # under-voltage and throttling, but in the past
}


def board(folder: Path, files: dict[str, str]) -> BoardState:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return read_state(folder)


def test_a_board(tmp_path: Path) -> None:
    state = board(tmp_path, PI)
    assert state == BoardState(
        model="Raspberry Pi 4 Model B Rev 1.4",
        governors=("ondemand",),
        mhz=1500.0,
        max_mhz=1800.0,
        limit_mhz=1800.0,
        temperature_c=48.312,
        load=0.0,
    )
    assert conditions(state, state) == (
        "Raspberry Pi 4 Model B Rev 1.4",
        "governor ondemand (not performance: the clock changes with the load)",
        "1500 of 1800 MHz at the end",
        "48 to 48 C",
        "not throttled",
    )


def test_throttling_shows_in_many_ways(tmp_path: Path) -> None:
    calm = board(tmp_path / "calm", PI)
    ways = {
        "sys/devices/platform/soc/soc:firmware/get_throttled": ("5", "under-voltage, it is throttled"),
        "sys/class/thermal/cooling_device0/cur_state": ("2", "cooling by cpufreq-cpu0"),
        "sys/devices/system/cpu/cpu0/cpufreq/scaling_max_freq": ("1200000", "the clock is limited to 1200 MHz"),
    }
    for number, (name, (text, meaning)) in enumerate(ways.items()):
        hot = board(tmp_path / str(number), {**PI, name: text})
        assert f"THROTTLED: {meaning}" in conditions(calm, hot)
    before, after = (BoardState(throttles=count) for count in (7, 9))
    assert "THROTTLED: cores were throttled 2 times" in conditions(before, after)
    assert "not throttled" in conditions(after, after)


def test_what_is_not_told_is_unknown(tmp_path: Path) -> None:
    state = board(tmp_path, {"sys/class/thermal/thermal_zone0/temp": "warm", "proc/loadavg": "64.0"})
    assert conditions(BoardState(), state)[:3] == ("governor unknown", "temperature unknown", "throttling unknown")
    assert any("busy with other work" in each for each in conditions(state, state))


def test_a_virtual_machine_is_named(tmp_path: Path) -> None:
    state = board(tmp_path, {"proc/device-tree/model": "linux,dummy-virt\0"})
    assert conditions(state, state)[:2] == ("linux,dummy-virt", "a virtual machine: its processor may be emulated")
    assert not any("virtual" in each for each in conditions(BoardState(model="Raspberry Pi 5"), BoardState()))
