"""The choice of layers in float, on made-up files."""

import pytest

from sepdeploy.core.mixed import Arithmetic, MixReason
from sepdeploy.planning.mixed import Cost, MixSearch

FLOAT, WEIGHTS = Arithmetic.FLOAT32, Arithmetic.WEIGHTS_ONLY

# What int8 adds to the noise of the output, per layer, and what a layer in float costs.
NOISE = {"a": 1e-4, "b": 4e-2, "c": 1e-2, "d": 1e-4}
COSTS = {
    "a": {FLOAT: Cost(-0.3, -0.4, -0.2), WEIGHTS: Cost(-0.1, -0.2, 0.1)},
    "b": {FLOAT: Cost(0.2, 0.1, 0.3), WEIGHTS: Cost(0.3, 0.2, 0.4)},
    "c": {FLOAT: Cost(0.1, 0.0, 0.2), WEIGHTS: Cost(0.2, 0.1, 0.3)},
    "d": {FLOAT: Cost(-0.1, -0.3, 0.1), WEIGHTS: Cost(0.5, 0.4, 0.6)},
}


def noise(kept):
    left = {FLOAT: 0.0, WEIGHTS: 0.5}
    return 1e-5 + sum(value * left.get(kept.get(name), 1.0) for name, value in NOISE.items())


def drop(kept):
    return 100 * noise(kept)


def search(limit, *, is_faster=True, float_drop=0.0, costs=COSTS):
    asked = []

    def is_whole_faster(kept):
        asked.append(dict(kept))
        return is_faster

    found = MixSearch(costs, "ms", drop, noise, is_whole_faster, limit, float_drop).result()
    return found, asked


def test_what_is_surely_faster_in_float_is_in_float():
    found, asked = search(None)
    assert found.kept == {"a": FLOAT}
    assert asked == [{"a": FLOAT}]
    (layer,) = (layer for layer in found.layers if layer.name == "a")
    assert (layer.reason, layer.difference) == (MixReason.FASTER, -0.3)
    assert found.drop_points is None


def test_the_whole_has_to_be_faster():
    found, _ = search(None, is_faster=False)
    assert found.kept == {}
    assert any("as a whole is not" in note for note in found.notes)


def test_a_limit_that_holds_changes_nothing():
    found, _ = search(6.0)
    assert found.kept == {"a": FLOAT}
    assert found.drop_points == pytest.approx(drop({}))
    assert found.mixed_drop_points == pytest.approx(drop({"a": FLOAT}))


@pytest.mark.parametrize(
    ("limit", "kept"),
    [
        (2.0, {"a": FLOAT, "b": FLOAT}),
        (0.5, {"a": FLOAT, "b": FLOAT, "c": FLOAT}),
    ],
)
def test_the_cheapest_layers_that_hold_the_limit(limit, kept):
    found, _ = search(limit)
    assert {name: each for name, each in found.kept.items() if name != "d"} == kept
    assert found.mixed_drop_points <= limit
    reasons = {layer.name: layer.reason for layer in found.layers}
    assert reasons["a"] is MixReason.FASTER
    assert reasons["b"] is MixReason.ACCURACY
    gains = {layer.name: layer.sqnr_gain_db for layer in found.layers}
    assert gains["b"] > gains["c"] > 0


def test_a_limit_out_of_reach_leaves_all_as_it_was():
    found, _ = search(1e-9)
    assert found.kept == {"a": FLOAT}
    assert any("even with every layer in float" in note for note in found.notes)


def test_what_the_float_file_loses_no_mix_wins_back():
    found, _ = search(2.0, float_drop=2.5)
    assert found.kept == {"a": FLOAT}
    assert any("the float file loses 2.50 points itself" in note for note in found.notes)


def test_without_layers_there_is_nothing_to_choose():
    found, asked = search(0.5, costs={})
    assert found.layers == ()
    assert asked == []
    assert any("even with" in note for note in found.notes)
