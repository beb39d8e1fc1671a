import math

import pytest

from sepdeploy.core.plan import Reason
from sepdeploy.errors import UsageError
from sepdeploy.schemes.complexity import scheme_costs
from sepdeploy.schemes.scheme import SCHEMES

NAMES = {"K": 3, "T": 1, "g": 4, "e": math.e, "log": math.log}


def rows(*geometry):
    return {row.name: row for row in scheme_costs(*geometry)}


@pytest.mark.parametrize("channels", [64, 128, 256])
def test_the_formulas_say_what_the_designs_cost(channels):
    """Exact where nothing is rounded; the optimized ones round groups to divisors, which costs a tenth at most."""
    middle = {"spatial_separable": channels, "low_rank": round(channels / 3 / 8) * 8}
    for name, row in rows(channels, 3, 32).items():
        formula = eval(row.complexity, {"__builtins__": {}}, {**NAMES, "C": channels, "r": middle.get(name)})
        if "optimized" in name:
            # Groups are whole, so the number of factors is not log(C * K^2): the optimum is not quite reached.
            assert formula == pytest.approx(row.params, rel=0.25 if "optimal" in name else 0.1)
        else:
            assert row.params == formula


def test_macs_are_weights_times_pixels_and_ratios_are_to_dense():
    found = rows(64, 3, 32)
    for row in found.values():
        assert row.macs == row.params * 32 * 32
        assert row.ratio == row.params / (64 * 64 * 9)
    assert list(found) == [*SCHEMES, "optimized_separable, optimal N"]


def test_receptive_fields_are_those_of_table_1():
    blind = {name for name, row in rows(64, 3, 32).items() if not row.keeps_receptive_field}
    assert blind == {"depthwise", "grouped"}


def test_the_order_of_the_paper_holds_for_wide_layers():
    found = rows(256, 3, 32)
    order = ("dense", "spatial_separable", "depthwise_separable", "optimized_separable")
    params = [found[name].params for name in (*order, "optimized_separable, optimal N")]
    assert params == sorted(params, reverse=True)


def test_a_scheme_that_cannot_says_why():
    found = rows(64, 1, 32)
    assert found["depthwise_separable"].refusal is Reason.POINTWISE
    assert found["depthwise_separable"].params is None
    assert found["optimized_separable"].params < found["dense"].params == 64 * 64
    assert rows(2, 3, 8)["optimized_separable"].refusal is Reason.FEW_CHANNELS


def test_even_kernels_keep_the_size():
    assert rows(16, 4, 10)["dense"].macs == 16 * 16 * 16 * 100


@pytest.mark.parametrize("geometry", [(0, 3, 32), (8, 0, 32), (8, 3, 0)])
def test_sizes_below_one(geometry):
    with pytest.raises(UsageError, match="at least 1"):
        scheme_costs(*geometry)
