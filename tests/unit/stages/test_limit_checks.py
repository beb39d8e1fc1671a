"""What was asked of the selection is looked at on what is handed over."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from torch import nn

from sepdeploy.core.artifact import Format, Precision, Role
from sepdeploy.core.measurement import Counts, Environment, Method
from sepdeploy.core.memory import MemoryProfile, MemoryStep
from sepdeploy.core.options import ConvertOptions, SelectionOptions
from sepdeploy.core.plan import Plan, SchemeOptions
from sepdeploy.stages import report
from sepdeploy.stages.report import _limit_checks

NETWORK = nn.Linear(199, 1)  # 200 parameters
MEMORY = MemoryProfile((MemoryStep("", "input", 12), MemoryStep("cat", "concat", 25)))


def checks(speedup=2.0, measured=None, **selection):
    options = ConvertOptions(Path("m.pt"), "a:b", "c", selection=SelectionOptions(**selection))
    measured = measured or SimpleNamespace(cost=3.0, speedup=speedup)
    converted = SimpleNamespace(measured=measured, artifact=SimpleNamespace(size_bytes=900))
    return {check.name: check for check in _limit_checks(options, converted, NETWORK, MEMORY)}


@pytest.mark.parametrize(
    ("name", "option", "holds", "is_broken", "sentence"),
    [
        ("latency", "max_latency", 3.0, 2.9, "3 ms for one inference on ort float32 (median), the limit is 2.9 ms"),
        ("latency", "max_latency_ratio", 0.5, 0.4, "50% of the original's latency on ort float32, the limit is 40%"),
        ("size", "max_size_bytes", 800, 799, "800 bytes of weights in float32 (the file has 900), the limit is 799"),
        ("memory", "max_memory_bytes", 100, 99, "100 bytes of activations at the peak in float32 (concat in cat)"),
    ],
)
def test_each_limit_is_checked(name, option, holds, is_broken, sentence):
    assert checks(**{option: holds})[name].is_met
    broken = checks(**{option: is_broken})[name]
    assert not broken.is_met
    assert sentence in broken.sentence


@pytest.mark.parametrize(("limit", "names"), [(800, ["size"]), (799, ["speed", "size"])])
def test_an_original_that_holds_the_limits_is_no_failure(limit, names):
    options = ConvertOptions(Path("m.pt"), "a:b", "c", selection=SelectionOptions(max_size_bytes=limit))
    artifact = SimpleNamespace(role=Role.CONVERTED, format=Format.ONNX, precision=Precision.FLOAT32, size_bytes=900)
    result = SimpleNamespace(artifact=artifact, measured=None, quality=None, numerics=None)
    checks = report._checks(options, Plan("auto", SchemeOptions(), ()), [result], None, NETWORK, MEMORY, 512)
    assert [check.name for check in checks] == names
    assert all(check.is_met for check in checks) == (limit == 800)


def test_without_a_limit_there_is_nothing_to_check():
    assert checks() == {}


def test_limits_of_an_emulated_core_are_in_modelled_cycles():
    numbers = (10, {"integer": 10}, 1, 1, 1, 1, 1, 2000.0, 4000.0, 1.5, 2, 0.0, Method.EMULATED_COUNT)
    counts = Counts(
        "Cortex-A72", *numbers, Environment("c", 1, "s", "r", 1), "00", speedup=2.0, speedup_low=1.5, speedup_high=2.5
    )
    check = checks(measured=counts, max_latency=2000.0)["latency"]
    assert check.is_met
    assert "2000 kcycles for one inference on ort float32 (modelled, the low end), the limit" in check.sentence
    assert not checks(measured=counts, max_latency=1999.0)["latency"].is_met
    share = checks(measured=counts, max_latency_ratio=0.5)["latency"]
    assert "50% of the original's modelled cycles" in share.sentence
