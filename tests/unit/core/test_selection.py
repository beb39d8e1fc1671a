import dataclasses

import pytest

from sepdeploy.core.artifact import Precision
from sepdeploy.core.chain import Chain, ChainSum, Factor
from sepdeploy.core.codec import from_json, to_json
from sepdeploy.core.measurement import Method
from sepdeploy.core.plan import Candidate
from sepdeploy.core.selection import Choice, LayerChoices, Selection
from sepdeploy.errors import UsageError

FORM = ChainSum((Chain((Factor(4, 4, (1, 1)),)),))


def selection(**changes) -> Selection:
    dense = Choice("dense", None, (), 0.0, 0.0, 0.0, 0.0, 100, 10)
    small = Choice("small", Candidate("low_rank", FORM, 40, 4), ("fold_norm",), -0.2, -0.3, -0.1, 0.05, 40, 4)
    layers = tuple(LayerChoices(name, (dense, small), {"large": "not cheaper"}) for name in ("a", "b"))
    values = {
        "chosen": {"a": "small", "b": "dense"}, "model_sha256": "0", "target": "ort", "precision": Precision.FLOAT32,
        "threads": 1, "unit": "ms", "method": Method.WALL_CLOCK, "original_cost": 1.0, "layers": layers,
    }  # fmt: skip
    return Selection(**{**values, **changes})


def test_what_is_chosen_adds_up():
    assert selection().predicted_cost == pytest.approx(0.8)
    assert selection(chosen={"a": "small", "b": "small"}).predicted_cost == pytest.approx(0.6)
    assert {name: choice.label for name, choice in selection().choices.items()} == {"a": "small", "b": "dense"}


def test_it_comes_back_from_its_file():
    assert from_json(Selection, to_json(selection())) == selection()


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ({"a": "small"}, "chooses None for b; its choices are: dense, small"),
        ({"a": "large", "b": "dense"}, "chooses 'large' for a; its choices are: dense, small"),
        ({"a": "small", "b": "dense", "c": "small"}, "chooses for c, which it does not list"),
    ],
)
def test_wrong_edits_are_refused(chosen, message):
    with pytest.raises(UsageError, match=message):
        selection(chosen=chosen)


def test_a_layer_is_found_by_name_and_listed_once():
    assert selection().layer("b").refused == {"large": "not cheaper"}
    with pytest.raises(UsageError, match="has no layer c; its layers are: a, b"):
        selection().layer("c")
    with pytest.raises(UsageError, match="lists a twice"):
        dataclasses.replace(selection(), layers=(selection().layers[0],) * 2)
