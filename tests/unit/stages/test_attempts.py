"""The limits that the guard is given, simulated with networks whose drops are known."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from sepdeploy.core.artifact import Format
from sepdeploy.core.files import write_text
from sepdeploy.core.looser_plan import LooserOutcome, LooserPlan, TriedPlan
from sepdeploy.core.options import ConvertOptions
from sepdeploy.core.report import Drops
from sepdeploy.core.stage_store import StageStore
from sepdeploy.core.training import ReconstructOptions
from sepdeploy.errors import UsageError
from sepdeploy.stages.attempts import (
    Attempt,
    AttemptFile,
    Attempts,
    Held,
    first_attempt,
    limit_options,
    looser_attempt,
    next_attempt,
)

PLAN = TriedPlan("ms", 15.0, 10.0, speedup=1.4, speedup_low=1.3, speedup_high=1.5)
LOOSER = Attempt(5.0, is_recovering=True, held=Held(3.0, 1.0, PLAN))


def options(**changes) -> ConvertOptions:
    return ConvertOptions(Path("m.pt"), "a:b", "c", scheme="depthwise_separable", **{"max_drop_points": 1.0, **changes})


@pytest.mark.parametrize(
    ("changes", "is_trained", "expected"),
    [
        ({}, False, Attempt(4.0, is_recovering=True)),
        ({}, True, Attempt(11.0, is_recovering=True, is_trained=True)),
        ({"reconstruct": None}, False, Attempt(1.0, is_recovering=False)),
        ({"reconstruct": None}, True, Attempt(11.0, is_recovering=True, is_trained=True)),
        ({"transfer": "data-free"}, False, Attempt(1.0, is_recovering=False)),
        ({"recoverable_points": 0.0}, False, Attempt(1.0, is_recovering=True)),
        ({"recoverable_points": 7.5}, True, Attempt(8.5, is_recovering=True, is_trained=True)),
        ({"max_drop_points": None}, False, Attempt(None, is_recovering=True)),
    ],
)
def test_the_first_limit_leaves_room_for_what_recovery_wins(changes, is_trained, expected):
    assert first_attempt(options(**changes), is_trained=is_trained) == expected


class Case:
    """A network of ten equal layers: each costs a point, of which recovery wins a share; int8 costs a constant."""

    def __init__(self, *, won: float, int8: float = 0.0) -> None:
        self.won, self.int8, self.tried = won, int8, []

    def run(self, chosen: ConvertOptions) -> tuple[float, Attempt]:
        """The drop of the file that the run ends with, and its attempt."""
        limit = chosen.max_drop_points
        attempt = first_attempt(chosen, is_trained=False)
        while True:
            drop = float(min(10, int(attempt.limit_points)))
            file = drop * (1 - self.won if attempt.is_recovering else 1) + self.int8
            self.tried.append((attempt.limit_points, attempt.is_recovering))
            following = None
            if file > limit and not attempt.is_last:
                following = next_attempt(attempt, limit, drop, file)
            if following is None:
                return file, attempt
            attempt = following
            assert len(self.tried) < 10


def test_what_is_won_back_is_used():
    case = Case(won=0.8)
    file, attempt = case.run(options())
    assert (file, attempt.limit_points) == (pytest.approx(0.8), 4.0)
    assert case.tried == [(4.0, True)]


def test_what_is_not_won_back_tightens_the_limit():
    case = Case(won=0.5)
    file, _ = case.run(options())
    assert file == 1.0
    assert case.tried == [(4.0, True), (2.0, True)]  # of 4 points 2 are left, so of 2 points 1 should be


def test_reconstruction_is_given_one_more_try_before_nothing_is_counted_on():
    attempt = Attempt(4.0, is_recovering=True, tightenings=1)
    third = next_attempt(attempt, 1.0, 2.4, 1.2)
    assert third == Attempt(2.0, is_recovering=True, tightenings=2, broken_points=2.4)
    assert next_attempt(third, 1.0, 2.0, 1.1).limit_points == 1.0


def test_the_third_attempt_with_training_does_not_count_on_it():
    attempt = Attempt(4.0, is_recovering=True, is_trained=True)
    second = next_attempt(attempt, 1.0, 4.0, 2.0)
    assert second == Attempt(2.0, is_recovering=True, is_trained=True, tightenings=1, broken_points=4.0)
    third = next_attempt(second, 1.0, 2.0, 1.1)
    assert third == Attempt(1.0, is_recovering=True, is_trained=True, tightenings=2, broken_points=2.0)
    fallback = next_attempt(Attempt(1.0, is_recovering=True, is_trained=True, tightenings=2), 1.0, 0.9, 1.1)
    assert fallback == Attempt(1.0, is_recovering=False, recovering_limit_points=1.0)


@pytest.mark.parametrize("won", [-3.0, -0.5, 0.0, 0.3, 0.9])
@pytest.mark.parametrize("int8", [0.0, 0.5, 1.0, 2.5, 7.0])
@pytest.mark.parametrize("max_drop", [0.0, 1.0, 3.0, 8.0])
def test_a_promise_that_holds_without_recovery_is_never_broken_by_it(won, int8, max_drop):
    chosen = options(max_drop_points=max_drop)
    without, _ = Case(won=won, int8=int8).run(replace(chosen, reconstruct=None))
    case = Case(won=won, int8=int8)
    file, attempt = case.run(chosen)
    if without <= max_drop:
        assert file <= max_drop
    assert len(case.tried) <= 8
    if file > max_drop:
        assert attempt.is_last, "where nothing helps, what was won back is handed over"
        assert attempt.is_recovering


def test_room_to_spare_is_tried_once_between_what_held_and_what_broke():
    second = next_attempt(Attempt(4.0, is_recovering=True), 1.0, 3.0, 1.5)
    assert (second.limit_points, second.broken_points) == (2.0, 3.0)
    looser = looser_attempt(second, 1.0, 2.0, 0.5, PLAN)
    assert (looser.limit_points, looser.held) == (2.5, Held(2.0, 1.0, PLAN)), "the middle: 3.8 would break it again"
    assert looser_attempt(looser, 1.0, 2.4, 0.5, PLAN) is None
    assert looser_attempt(second, 1.0, 2.0, 0.9, PLAN) is None, "there is no room"


def test_a_plan_that_is_hardly_cheaper_or_measures_slower_is_not_worth_another_recovery():
    looser = looser_attempt(Attempt(2.0, is_recovering=True), 1.0, 2.0, 0.5, PLAN)
    assert looser.obstacle(replace(PLAN, cost=9.9)) is LooserOutcome.NOT_CHEAPER
    assert looser.obstacle(replace(PLAN, cost=9.0)) is None
    measured = replace(PLAN, cost=9.0, speedup=1.2, speedup_low=1.1, speedup_high=1.29)
    assert looser.obstacle(measured) is LooserOutcome.SLOWER
    assert looser.obstacle(replace(measured, speedup_high=1.31)) is None, "the intervals overlap"
    assert Attempt(2.0, is_recovering=True).obstacle(replace(PLAN, cost=99.0)) is None


def test_the_looser_limit_is_in_proportion_to_what_was_lost():
    attempt = Attempt(4.0, is_recovering=True)
    assert looser_attempt(attempt, 1.0, 3.0, 0.5, PLAN).limit_points == pytest.approx(5.7)
    assert looser_attempt(attempt, 1.0, 3.0, -0.4, PLAN).limit_points == pytest.approx(14.25), "of nothing, not all"
    assert looser_attempt(attempt, 1.0, 1.0, 0.7, PLAN) is None, "the guard had more room than that"
    assert looser_attempt(attempt, 0.0, 3.0, -0.4, PLAN) is None


def test_another_training_needs_more_room():
    attempt = Attempt(11.0, is_recovering=True, is_trained=True)
    assert looser_attempt(attempt, 1.0, 10.5, 0.6, PLAN) is None
    assert looser_attempt(attempt, 1.0, 10.5, 0.4, PLAN).limit_points > 11


@pytest.mark.parametrize("changes", [{"is_recovering": False}, {"is_last": True}, {"limit_points": None}])
def test_what_is_settled_is_not_loosened(changes):
    attempt = replace(Attempt(4.0, is_recovering=True), **changes)
    assert looser_attempt(attempt, 1.0, 3.0, 0.1, PLAN) is None


def test_without_recovery_there_are_three_attempts():
    case = Case(won=0.0, int8=5.0)
    file, attempt = case.run(options(reconstruct=None, max_drop_points=4.0))
    assert [is_recovering for _, is_recovering in case.tried] == [False] * 3
    assert file > 4
    assert attempt.tightenings == 2


def test_the_attempt_is_remembered_for_the_same_inputs_only(tmp_path):
    attempt = Attempt(3.5, is_recovering=True, tightenings=1)
    path = tmp_path / "limit.json"
    assert AttemptFile(path, {"a": 1}).read() is None
    AttemptFile(path, {"a": 1}).write(attempt)
    assert AttemptFile(path, {"a": 1}).read() == attempt
    assert AttemptFile(path, {"a": 2}).read() is None
    path.write_bytes(path.read_bytes()[:-5])
    assert AttemptFile(path, {"a": 1}).read() is None


def test_what_another_conversion_set_aside_is_not_brought_back(tmp_path):
    file = tmp_path / "made"
    store = StageStore(tmp_path, on_change=lambda: None)
    store.run("a", {}, (file,), lambda: write_text(file, "theirs"))
    store.set_aside()  # by a run that was killed then
    last = Attempt(3.0, is_recovering=True, is_last=True)
    Attempts(store, {"max_drop": 2}, replace(last, is_last=False), resumes=True)
    store.run("a", {"max_drop": 2}, (file,), lambda: write_text(file, "ours"))
    AttemptFile(store.work / "limit.json", {"max_drop": 2}).write(last)  # killed before it was finished
    assert Attempts(store, {"max_drop": 2}, last, resumes=True).present == last
    assert file.read_text() == "ours"


def test_a_looser_limit_that_leaves_nothing_goes_back(tmp_path):
    store = StageStore(tmp_path, on_change=lambda: None)
    attempts = Attempts(store, {}, LOOSER, resumes=True)
    assert attempts.after_nothing(1.0, SimpleNamespace(limit_points=5.0))
    looser = LooserPlan(LooserOutcome.NOT_CHEAPER, 1.0, 5.0, PLAN)
    assert attempts.present == Attempt(3.0, is_recovering=True, is_last=True, looser=looser)


@pytest.mark.parametrize(
    ("drop", "outcome", "limit"), [(0.9, LooserOutcome.HANDED_OVER, 5.0), (1.1, LooserOutcome.OVER_LIMIT, 3.0)]
)
def test_what_became_of_a_looser_limit_is_known_in_the_next_run_too(tmp_path, drop, outcome, limit):
    store = StageStore(tmp_path, on_change=lambda: None)
    attempts = Attempts(store, {}, LOOSER, resumes=True)
    found = replace(PLAN, cost=8.0)
    assert attempts.obstacle(found) is None
    guard, drops = SimpleNamespace(quality=SimpleNamespace(drop_points=4.0)), Drops(drop, 0.5, 0.0)
    if drop > 1:
        assert attempts.after_failure(1.0, guard, drops)
    else:
        assert not attempts.after_success(1.0, guard, drops)
    attempts.finish()
    again = Attempts(store, {}, Attempt(9.0, is_recovering=True), resumes=True).present
    assert again.looser == LooserPlan(outcome, 1.0, 5.0, PLAN, replace(found, drop_points=drop))
    assert (again.limit_points, again.is_last, again.held) == (limit, True, None)


def test_a_looser_limit_that_the_disk_has_no_room_for_is_told(tmp_path, monkeypatch):
    store = StageStore(tmp_path, on_change=lambda: None)
    attempts = Attempts(store, {}, Attempt(3.0, is_recovering=True), resumes=True)

    def full():
        raise UsageError("no space left")

    monkeypatch.setattr(store, "set_aside", full)
    attempts.obstacle(PLAN)
    guard = SimpleNamespace(quality=SimpleNamespace(drop_points=2.5))
    assert not attempts.after_success(1.0, guard, Drops(0.2, 0.5, 0.0))
    looser = attempts.present.looser
    assert (looser.outcome, looser.error, looser.found) == (LooserOutcome.FAILED, "no space left", None)
    assert (looser.held.drop_points, attempts.present.limit_points) == (0.2, 3.0)


def test_no_reconstruction_is_an_option_too():
    assert options().reconstruct == ReconstructOptions()
    assert options().reconstructs
    assert not options(transfer="data-free").reconstructs


def test_an_attempt_is_found_again_whatever_the_options(tmp_path):
    """What it depends on comes back from JSON as it went."""
    chosen = options(lowering=("fold_norm", "fold_shuffle"), formats=(Format.ONNX,))
    images = SimpleNamespace(sha256="0")
    basis = limit_options(chosen, SimpleNamespace(train=None, calibration=images, validation=images), None)
    AttemptFile(tmp_path / "limit.json", basis).write(Attempt(2.5, is_recovering=True))
    assert AttemptFile(tmp_path / "limit.json", basis).read() == Attempt(2.5, is_recovering=True)
