import pytest

from sepdeploy.core.chain import Chain, ChainSum, Factor
from sepdeploy.core.conv import ConvCall, ConvSite, ConvSpec, Trace
from sepdeploy.core.plan import Candidate, Decision, Kept, Plan, Reason, Replaced, SchemeOptions
from sepdeploy.errors import UsageError

CANDIDATE = Candidate("dense", ChainSum((Chain((Factor(4, 4, (1, 1)),)),)), 1, 1)


def plan(*decisions):
    return Plan("dense", SchemeOptions(), decisions)


def test_views_keep_the_order_and_sum():
    p = plan(
        Decision("z", 1, 2, Replaced(CANDIDATE)),
        Decision("a", 3, 4, Kept(Reason.POINTWISE)),
        Decision("m", 5, 6, Replaced(CANDIDATE)),
    )
    assert list(p.replaced) == ["z", "m"]
    assert list(p.kept) == ["a"]


def test_a_plan_changes_the_macs_of_what_it_replaces_only():
    calls = (ConvCall((1, 4, 5, 5), (1, 4, 5, 5), 30),) * 2
    sites = tuple(ConvSite(name, "Conv2d", ConvSpec(4, 4, (1, 1)), calls, params=20) for name in "ab")
    traced = Trace(sites, (1, 4, 5, 5), ((1, 4, 5, 5),), total_macs=200, total_params=50)
    p = plan(Decision("a", 60, 20, Replaced(CANDIDATE)), Decision("b", 60, 20, Kept(Reason.POINTWISE)))
    assert p.macs_of(traced) == 200 - 60 + 1


def test_other_outcome_changes_one_decision_only():
    before = plan(Decision("a", 1, 2, Replaced(CANDIDATE)), Decision("b", 3, 4, Replaced(CANDIDATE)))
    after = before.with_outcome("a", Kept(Reason.EXCEEDS_MAX_DROP, "2 points"))
    assert after.decisions == (Decision("a", 1, 2, Kept(Reason.EXCEEDS_MAX_DROP, "2 points")), before.decisions[1])
    assert list(before.replaced) == ["a", "b"]


def test_a_name_twice():
    with pytest.raises(UsageError, match="the plan decides twice about a"):
        plan(Decision("a", 1, 1, Kept(Reason.POINTWISE)), Decision("a", 1, 1, Kept(Reason.DEPTHWISE)))


def test_reasons_are_distinct_sentences():
    assert len({reason.value for reason in Reason}) == len(Reason.__members__)  # equal values would merge members
    assert all(reason.value[0].islower() or reason.value[0].isdigit() for reason in Reason)
    assert not any(reason.value.endswith(".") for reason in Reason)
