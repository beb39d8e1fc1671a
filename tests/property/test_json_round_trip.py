"""What is written is read back equal."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sepdeploy.core.chain import Chain, ChainSum, Factor, Shuffle
from sepdeploy.core.codec import from_json, to_json
from sepdeploy.core.conv import ConvSite, ConvSpec, Trace
from sepdeploy.core.int8_proof import FloatLayer, Int8Proof, LayerSqnr
from sepdeploy.core.plan import Candidate, Decision, Kept, Plan, Replaced, SchemeOptions
from sepdeploy.core.report import Report
from sepdeploy.errors import SepdeployError, UsageError

quick = settings(deadline=None, max_examples=40, derandomize=True, database=None)

pairs = st.tuples(st.integers(1, 5), st.integers(1, 5))
paddings = st.tuples(*[st.integers(0, 3)] * 4)


@st.composite
def chains(draw):
    widths = draw(st.lists(st.integers(1, 4), min_size=2, max_size=4))
    stages = []
    for before, after in itertools.pairwise(widths):
        groups = draw(st.sampled_from([1, 2]))
        stages.append(Factor(2 * before, 2 * after, draw(pairs), draw(pairs), draw(paddings), draw(pairs), groups))
        if draw(st.booleans()):
            stages.append(Shuffle(2))
    return Chain(tuple(stages))


candidates = st.builds(
    Candidate, st.text(), st.builds(lambda chain, n: ChainSum((chain,) * n), chains(), st.integers(1, 3)),
    st.integers(0, 2**62), st.integers(0, 2**62),
)  # fmt: skip
outcomes = st.one_of(st.builds(Replaced, candidates), st.from_type(Kept))
plans = st.builds(
    Plan,
    st.text(),
    st.builds(SchemeOptions, st.integers(1, 99), st.floats(0, 1, exclude_min=True)),
    st.lists(
        st.builds(Decision, st.text(), st.integers(0), st.integers(0), outcomes), max_size=4, unique_by=lambda d: d.name
    ).map(tuple),
)
st.register_type_strategy(float, st.floats(allow_nan=False, allow_infinity=False))
st.register_type_strategy(
    Int8Proof,
    st.builds(
        lambda int8_macs, floats, layers: Int8Proof(
            int8_macs + sum(layer.macs for layer in floats), int8_macs, floats, layers
        ),
        st.integers(0, 2**40),
        st.lists(st.from_type(FloatLayer), max_size=3).map(tuple),
        st.lists(st.from_type(LayerSqnr), max_size=3).map(tuple),
    ),
)
specs = st.from_type(ConvSpec)


@given(plans)
@quick
def test_plan(plan):
    assert from_json(Plan, to_json(plan)) == plan


@given(st.builds(Trace, st.lists(st.from_type(ConvSite), max_size=3).map(tuple)))
@quick
def test_trace(trace):
    assert from_json(Trace, to_json(trace)) == trace


@given(st.builds(Report, plan=plans))
@settings(quick, max_examples=15)
def test_report(report):
    assert from_json(Report, to_json(report)) == report


@given(st.binary(max_size=40) | st.text(max_size=40))
@quick
@pytest.mark.parametrize("kind", [Plan, Trace, Report])
def test_noise_is_a_usage_error(kind, text):
    with pytest.raises(UsageError, match="not a valid"):
        from_json(kind, text)


@given(plans, st.data())
@quick
def test_cut_off_file_is_a_usage_error(plan, data):
    text = to_json(plan).rstrip()
    cut = data.draw(st.integers(0, len(text) - 1))
    with pytest.raises(SepdeployError, match="not a valid Plan"):
        from_json(Plan, text[:cut])
