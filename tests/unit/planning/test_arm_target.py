from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from sepdeploy.bench import arm_counts
from sepdeploy.bench.arm_cores import find_core
from sepdeploy.bench.arm_root import missing_tools
from sepdeploy.core.artifact import Format, Precision
from sepdeploy.core.conv import ConvSpec
from sepdeploy.core.measurement import Counts, Environment, Method
from sepdeploy.core.options import target_for
from sepdeploy.core.plan import SchemeOptions
from sepdeploy.core.price_cache import PriceCache
from sepdeploy.core.progress import Silent
from sepdeploy.core.selection import Price, Unpriced
from sepdeploy.errors import ToolError, UsageError
from sepdeploy.planning import block_files, target
from sepdeploy.planning.fused_block import dense_block
from sepdeploy.planning.price import price_blocks
from sepdeploy.planning.target import bench_target, find_target
from sepdeploy.schemes.scheme import find_scheme

SPEC = ConvSpec(64, 64, (3, 3), padding=(1, 1, 1, 1))
DENSE = dense_block(SPEC, (12, 12), activation="relu")
SEPARABLE = replace(DENSE, form=find_scheme("depthwise_separable").design(SPEC, SchemeOptions(terms=1)))

emulated = pytest.mark.skipif(bool(missing_tools()), reason=f"needs {', '.join(missing_tools())}")


def counts(low: float, high: float) -> Counts:
    environment = Environment("Cortex-A72 emulated", 1, "Linux aarch64", "runtime 1", 1)
    return Counts(
        *("Cortex-A72", 10, {"integer": 10}, 1, 1, 1, 1, 1, low, high, 1.5, 2, 0.0),
        *(Method.EMULATED_COUNT, environment, "00"),
    )


@emulated
def test_blocks_are_priced_and_remembered(tmp_path: Path) -> None:
    name = "cortex-a76:ort"
    core = find_target(name, Precision.INT8, 1)
    cache = PriceCache(tmp_path / "prices")
    prices = price_blocks(core, {DENSE: (SEPARABLE,)}, cache)
    price = prices[DENSE, SEPARABLE]
    assert isinstance(price, Price)
    assert (price.unit, price.method) == ("kcycles", Method.EMULATED_COUNT)
    assert price.difference_low <= price.difference <= price.difference_high < 0
    assert price.value < price.dense_value
    (row,) = cache.summary()
    assert (row.target, row.cpu.endswith(", emulated")) == (name, True)


@emulated
def test_the_key_has_all_that_prices_depend_on() -> None:
    a72, a76 = (find_target(name, Precision.INT8, 1).key() for name in ("cortex-a72", "cortex-a76"))
    assert json.loads(json.dumps(a72)) == a72
    assert set(a72["tools"]) == {"qemu", "llvm-mca", "plugin", "program"}
    assert a72["tools"]["qemu"].startswith("7.2")
    assert a72["runtime"].startswith("ai-edge-litert ")
    assert {key for key in a72 if a72[key] != a76[key]} == {"target", "core", "cpu"}


def test_ends_of_a_difference_are_those_of_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        block_files, "write_block_files", lambda blocks, *rest: [Path(str(i)) for i in range(len(blocks))]
    )
    found = [counts(100, 200), counts(40, 190), "RuntimeError: no such operator"]
    monkeypatch.setattr(arm_counts, "count_files", lambda *given, **options: found)
    made = target.TARGETS_BY_NAME["cortex-a72"]().make(Precision.INT8, 1)
    price, reason = made.measure(DENSE, [SEPARABLE, SEPARABLE], seconds=1, seed=0, progress=Silent())
    assert reason == Unpriced("RuntimeError: no such operator", is_lasting=True)
    assert (price.difference_low, price.difference, price.difference_high) == (-60, -60, -10)
    found[0] = "the guest crashed (SIGKILL)"
    assert made.measure(DENSE, [SEPARABLE], seconds=1, seed=0, progress=Silent()) == [
        Unpriced("the layer as it is cannot be measured: the guest crashed (SIGKILL)", is_lasting=False)
    ]


def test_whole_files_are_compared_by_both_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arm_counts, "count_files", lambda *given, **options: [counts(100, 300), counts(50, 100)])
    reference, other = arm_counts.compare_counts(find_core("cortex-a72"), [Path("a"), Path("b")], Silent())
    assert reference.speedup is None
    assert (other.speedup_low, other.speedup, other.speedup_high) == (2.0, 2.0, 3.0)


def test_targets_by_format() -> None:
    assert target_for("cortex-a72", Format.ONNX) == "cortex-a72:ort"
    assert target_for("cortex-a72:ort", Format.TFLITE) == "cortex-a72"
    assert target_for("ort", Format.TFLITE) == "litert"
    with pytest.raises(UsageError, match="there is no target 'npu'; choose one of ort, litert, cortex-a53"):
        target_for("npu", Format.ONNX)


def test_missing_programs_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for find in (
        lambda: find_target("cortex-a72", Precision.INT8, 1),
        lambda: bench_target("cortex-a72", Format.ONNX, 1),
    ):
        with pytest.raises(ToolError, match=r"target cortex-a72 needs qemu-aarch64, .*: run apt-get install qemu-user"):
            find()
