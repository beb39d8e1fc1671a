"""A table that was made in less time than its prices take is made anew."""

import pytest

from sepdeploy.core.artifact import Precision
from sepdeploy.core.codec import write_json
from sepdeploy.core.measurement import Method
from sepdeploy.core.selection import Choice, LayerChoices, Selection
from sepdeploy.planning.price import NOT_MEASURED, first_reason
from sepdeploy.stages.weigh import _lacking_prices, _missing_notes


@pytest.mark.parametrize(("why", "is_lacking"), [(f"{NOT_MEASURED}no time", True), ("it cannot be built", False)])
def test_only_what_the_time_did_not_last_for_is_made_up_for(tmp_path, why, is_lacking):
    layer = LayerChoices("0", (Choice("dense", None, (), 0.0, 0.0, 0.0, 0.0, 9, 9),), {"low_rank r=2": why})
    weighed = Selection({"0": "dense"}, "abc", "ort", Precision.FLOAT32, 1, "ms", Method.WALL_CLOCK, 1.0, (layer,))
    write_json(tmp_path / "selection.json", weighed)
    assert _lacking_prices(tmp_path / "selection.json") == (weighed if is_lacking else None)


def test_of_several_reasons_the_one_counts_that_the_next_run_may_do_away_with():
    assert first_reason(["refused", f"{NOT_MEASURED}no time"]) == f"{NOT_MEASURED}no time"
    assert first_reason(["refused", "refused too"]) == "refused"


def test_what_is_missing_is_said():
    found = {("dense", 1): f"{NOT_MEASURED}no time", ("dense", 2): "refused", ("dense", 3): f"{NOT_MEASURED}no memory"}
    (note,) = _missing_notes(found)
    assert note == "2 forms of layers not measured (no time)"
    assert _missing_notes({("dense", 2): "refused"}) == ()


def test_no_table_lacks_nothing(tmp_path):
    assert _lacking_prices(tmp_path / "selection.json") is None
