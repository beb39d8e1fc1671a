from pathlib import Path

import pytest

from sepdeploy.core.artifact import Precision
from sepdeploy.core.options import DEFAULT_MAX_DROP, ConvertOptions, SelectionOptions
from sepdeploy.errors import UsageError


def options(**changes) -> ConvertOptions:
    return ConvertOptions(Path("m.pt"), "a:b", "c", **changes)


def test_a_selection_without_any_limit_may_lose_one_point():
    assert options().selects
    assert options().max_drop_points == DEFAULT_MAX_DROP
    assert options(max_drop_points=0.0).max_drop_points == 0.0
    assert options(selection=SelectionOptions(max_latency_ratio=0.5)).max_drop_points is None
    assert options(scheme="low_rank").max_drop_points is None
    assert options(plan=Path("plan.json")).max_drop_points is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"goal": "speed"}, "no objective 'speed'; choose one of latency, macs, params"),
        ({"max_latency": 0.0}, "must be above 0"),
        ({"max_memory_bytes": -1}, "must be above 0"),
        ({"max_latency_ratio": 1.5}, "at most 1, got 1.5"),
        ({"max_latency": 1.0, "max_latency_ratio": 0.5}, "give one of them"),
        ({"seconds_per_block": 0.0}, "must be above 0"),
        ({"pricing_seconds": float("nan")}, "must be above 0"),
    ],
)
def test_limits_out_of_range_are_refused(changes, message):
    with pytest.raises(UsageError, match=message):
        SelectionOptions(**changes)


def test_what_a_selection_cannot_do_is_refused():
    with pytest.raises(UsageError, match="--objective macs makes that small within --max-drop"):
        SelectionOptions(goal="macs", max_latency_ratio=0.5)
    with pytest.raises(UsageError, match="weighs the damage that forms do after the anchored transfer"):
        options(transfer="data-free")
    assert options(transfer="data-free", scheme="low_rank").transfer == "data-free"


def test_what_only_a_selection_reads_is_refused_elsewhere():
    for changes in ({"scheme": "low_rank"}, {"plan": Path("plan.json")}):
        with pytest.raises(UsageError, match="are for --scheme auto"):
            options(selection=SelectionOptions(goal="macs"), **changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"precisions": (Precision.INT8,), "precision": Precision.INT8}, "--precisions must have float32"),
        ({"precisions": tuple(Precision), "precision": Precision.FLOAT16}, "--precision is float32 or int8"),
        ({"precisions": (Precision.FLOAT32,), "precision": Precision.INT8}, "int8 is left out of --precisions"),
    ],
)
def test_precisions_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(UsageError, match=message):
        options(**changes)
