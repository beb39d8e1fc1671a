import pytest

from sepdeploy.core.report import NetworkCost
from sepdeploy.errors import UsageError
from sepdeploy.planning.match_multiplier import match_multiplier

ORIGINAL = NetworkCost(macs=1000, params=1000, convs=1)


def search(cost_at, match, step=0.125):
    """The multiplier, and how many multipliers were tried."""
    tried = []

    def counted(multiplier):
        tried.append(multiplier)
        macs, params = cost_at(multiplier)
        return NetworkCost(round(macs), round(params), 1)

    multiplier, cost = match_multiplier(counted, ORIGINAL, match, step)
    assert (cost.macs, cost.params) == tuple(map(round, cost_at(multiplier)))
    assert len(set(tried)) == len(tried)
    return multiplier, len(tried)


@pytest.mark.parametrize(
    ("match", "macs", "params", "expected"),
    [
        ("macs", 75, 1, 3.625),  # 986 at 3.625, 1055 at 3.75
        ("macs", 73, 9999, 3.75),  # 959 at 3.625, 1027 at 3.75
        ("params", 1, 75, 3.625),
        ("both", 75, 75, 3.625),
        ("both", 73, 60, 3.625),  # 3.75 is nearer, but exceeds by 2.7%
        ("both", 71.5, 60, 3.75),  # 3.75 exceeds by 0.5% only
        ("both", 20, 75, 3.625),  # the parameters bind
        ("both", 4000, 4000, 0.5),
        ("macs", 0.5, 1, 44.75),
    ],
)
def test_the_nearest_multiplier(match, macs, params, expected):
    multiplier, tried = search(lambda m: (macs * m**2, params * m**2), match)
    assert multiplier == expected
    assert tried <= 16


def test_the_step_is_respected():
    assert search(lambda m: (100 * m**2, 1), "macs", step=0.5)[0] == 3.0
    assert search(lambda m: (100 * m**2, 1), "macs", step=0.01)[0] == pytest.approx(3.16)


def test_a_dip_beside_the_bisection_is_found():
    """Rounding to whole groups: 3.75 costs a little less than 3.625."""
    costs = {3.625: (1020, 1), 3.75: (1005, 1)}
    assert search(lambda m: costs.get(m, (75 * m**2, 1)), "both")[0] == 3.75


def test_nothing_fits():
    with pytest.raises(UsageError, match=r"even at a channel multiplier of 0.125 this costs more .*--match"):
        search(lambda m: (2000, 1), "both")
    with pytest.raises(UsageError, match="multiplier of 64 is still cheaper"):
        search(lambda m: (1, 1), "both")
    with pytest.raises(UsageError, match="nothing to match"):
        match_multiplier(lambda m: ORIGINAL, NetworkCost(0, 10, 0), "macs", 0.125)
