"""Which limits the guard is given, one after the other, until the target's file holds --max-drop.

The guard measures the network right after the transfer. What comes later moves the drop both ways: reconstruction and
training win points back, int8 loses some. So the first limit is `--max-drop` plus what recovery usually wins, and each
next one is tighter by what the file lost too much. If recovery has not kept the promise after four attempts, three if
each means another training, the guard does what it would have done without it: a promise that can be kept without
recovery is not broken by trying.

Where forms are chosen by their cost and recovery keeps the promise with room to spare, one looser limit is tried too,
between this one and those that broke it. What it has to beat is set aside meanwhile, and brought back if it does not.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from sepdeploy.core.codec import read_json, to_data, write_json
from sepdeploy.core.files import sha256_of_file
from sepdeploy.core.looser_plan import LooserOutcome, LooserPlan, TriedPlan
from sepdeploy.core.options import ConvertOptions
from sepdeploy.core.report import Drops
from sepdeploy.core.stage_store import StageStore
from sepdeploy.errors import ContractError, UsageError
from sepdeploy.stages.fault import is_beyond_transfer
from sepdeploy.stages.guard import GuardRecord
from sepdeploy.stages.load import Inputs
from sepdeploy.stages.versions import versions
from sepdeploy.train.hooks import Hook

__all__ = [
    "Attempt",
    "AttemptFile",
    "Attempts",
    "Held",
    "first_attempt",
    "limit_options",
    "looser_attempt",
    "next_attempt",
    "without_recovery",
]

_MAX_TIGHTENINGS = 2
_MAX_TIGHTENINGS_OF_RECONSTRUCTION = 3
"""The last one counts on nothing, so one more lets the estimate follow the network; reconstruction takes minutes."""

_FULL_RATIO = 0.8
_FULL_RATIO_OF_TRAINING = 0.5
"""Share of the promise below which there is room to spare: less of it where looking for more means another training."""

_AIM_RATIO = 0.95
"""Share of the promise that a looser limit aims at."""

_LEAST_LOSS_RATIO = 0.2
"""Share of the promise that a network is taken to lose at least: none wins by being replaced more and more."""

_WORTH_RATIO = 0.97
"""Cost of a looser plan as a share of the one that it has to beat, above which it is not worth another recovery."""


@dataclass(frozen=True, slots=True)
class Held:
    """An attempt that kept the promise, while a looser one is tried.

    Attributes:
        limit_points: Its limit.
        max_drop_points: The promise.
        plan: What it came to.
    """

    limit_points: float
    max_drop_points: float
    plan: TriedPlan


@dataclass(frozen=True, slots=True)
class Attempt:
    """One try to hold --max-drop.

    Attributes:
        limit_points: Limit of the guard; None if there is none.
        is_recovering: Whether reconstruction and training follow.
        is_trained: Whether that takes a training.
        tightenings: How often the limit was made tighter before.
        is_last: Whether its result stands, whatever it is.
        recovering_limit_points: Limit of the last attempt with recovery, once that was given up.
        broken_points: Least that a network lost when the guard measured it and that broke the promise in the end.
        held: What is handed over if this attempt fails; None unless a looser limit is tried.
        looser: What became of the looser limit, once that is settled.
    """

    limit_points: float | None
    is_recovering: bool
    is_trained: bool = False
    tightenings: int = 0
    is_last: bool = False
    recovering_limit_points: float | None = None
    broken_points: float | None = None
    held: Held | None = None
    looser: LooserPlan | None = None

    @property
    def most_tightenings(self) -> int:
        """How often the limit may be made tighter."""
        is_brief = self.is_recovering and not self.is_trained
        return _MAX_TIGHTENINGS_OF_RECONSTRUCTION if is_brief else _MAX_TIGHTENINGS

    def obstacle(self, plan: TriedPlan) -> LooserOutcome | None:
        """Why a plan is not worth another recovery; None if it is."""
        if self.held is None:
            return None
        if plan.cost >= _WORTH_RATIO * self.held.plan.cost:
            return LooserOutcome.NOT_CHEAPER
        return LooserOutcome.SLOWER if plan.is_surely_slower(self.held.plan) else None

    def settled(self, outcome: LooserOutcome, found: TriedPlan | None, error: str = "") -> Attempt:
        """What is final: this attempt if it is the one to hand over, else what kept the promise before."""
        if self.held is None or self.limit_points is None:
            raise ContractError("there is no looser limit to settle")
        looser = LooserPlan(outcome, self.held.max_drop_points, self.limit_points, self.held.plan, found, error)
        limit = self.limit_points if outcome is LooserOutcome.HANDED_OVER else self.held.limit_points
        return replace(self, limit_points=limit, held=None, looser=looser, is_last=True)


def first_attempt(options: ConvertOptions, *, is_trained: bool) -> Attempt:
    """Where to begin, given whether the network is fine-tuned."""
    is_recovering = options.reconstructs or is_trained
    if options.max_drop_points is None:
        return Attempt(None, is_recovering, is_trained)
    limit = options.max_drop_points + options.slack_points(is_trained=is_trained)
    return Attempt(limit, is_recovering, is_trained)


def next_attempt(
    attempt: Attempt, max_drop_points: float, guard_drop_points: float, file_drop_points: float
) -> Attempt | None:
    """What to try after an attempt that broke the promise; None if nothing is left.

    Args:
        attempt: The one that failed.
        max_drop_points: The promise.
        guard_drop_points: What its network lost when the guard measured it.
        file_drop_points: What the target's file loses, more than promised.
    """
    if attempt.tightenings < attempt.most_tightenings:
        # Right if what follows the guard always moves the drop by as much, as int8 does ...
        limit = guard_drop_points - (file_drop_points - max_drop_points)
        if attempt.is_recovering:
            # ... or in proportion, as recovery does: the safer of both, for the next try may be another training.
            limit = min(limit, guard_drop_points * max_drop_points / file_drop_points)
            if attempt.tightenings == attempt.most_tightenings - 1:
                limit = min(limit, max_drop_points)
        limit = max(limit, 0.0)
        broken = guard_drop_points
        if attempt.broken_points is not None:
            broken = min(broken, attempt.broken_points)
        return replace(attempt, limit_points=limit, tightenings=attempt.tightenings + 1, broken_points=broken)
    if attempt.is_recovering:
        return replace(without_recovery(max_drop_points), recovering_limit_points=attempt.limit_points)
    if attempt.recovering_limit_points is not None:
        # Broken either way: then rather with what was won back. Its training is still there, so this costs little.
        return Attempt(attempt.recovering_limit_points, is_recovering=True, is_last=True)
    return None


def looser_attempt(
    attempt: Attempt, max_drop_points: float, guard_drop_points: float, file_drop_points: float, plan: TriedPlan
) -> Attempt | None:
    """What to try after an attempt that kept the promise; None if that is good enough.

    Args:
        attempt: The one that kept it.
        max_drop_points: The promise.
        guard_drop_points: What its network lost when the guard measured it.
        file_drop_points: What the target's file loses, at most what was promised.
        plan: What it came to.
    """
    if not attempt.is_recovering or attempt.is_last or attempt.held is not None or attempt.limit_points is None:
        return None  # without recovery the guard has filled the limit; and once is enough
    if max_drop_points == 0:
        return None
    if file_drop_points > (_FULL_RATIO_OF_TRAINING if attempt.is_trained else _FULL_RATIO) * max_drop_points:
        return None
    lost = max(file_drop_points, _LEAST_LOSS_RATIO * max_drop_points)
    limit = max(guard_drop_points, lost) * _AIM_RATIO * max_drop_points / lost
    if attempt.broken_points is not None:
        limit = min(limit, (guard_drop_points + attempt.broken_points) / 2)
    if limit <= attempt.limit_points:
        return None  # the guard had as much before, and found nothing that would use it
    return replace(attempt, limit_points=limit, held=Held(attempt.limit_points, max_drop_points, plan))


def without_recovery(max_drop_points: float) -> Attempt:
    """Where to begin if nothing is won back after the guard."""
    return Attempt(max_drop_points, is_recovering=False)


@dataclass(frozen=True, slots=True)
class _Remembered:
    """An attempt and what it depends on."""

    inputs: dict[str, object]
    attempt: Attempt


class AttemptFile:
    """The present attempt on disk, so that a killed run does not begin with the first one again.

    Args:
        path: The file.
        inputs: What the choice of attempts depends on, as JSON data.
    """

    def __init__(self, path: Path, inputs: dict[str, object]) -> None:
        self._path = path
        self._inputs = to_data(inputs)  # as it comes back: lists for tuples

    def read(self) -> Attempt | None:
        """The attempt of an earlier run with the same inputs; None if there is none."""
        try:
            known = read_json(_Remembered, self._path)
        except UsageError:
            return None  # not there, or cut off
        return known.attempt if known.inputs == self._inputs else None

    def write(self, attempt: Attempt) -> None:
        """Remember `attempt`."""
        write_json(self._path, _Remembered(self._inputs, attempt))


class Attempts:
    """The attempts of one conversion, the present one on disk.

    Args:
        store: Holds what an attempt has made while another is tried.
        inputs: What the choice of attempts depends on, as JSON data.
        first: Where to begin, if not where an earlier run with the same inputs was.
        resumes: Whether an earlier run is gone on from.

    The `promise` of its methods is --max-drop.
    """

    def __init__(self, store: StageStore, inputs: dict[str, object], first: Attempt, *, resumes: bool) -> None:
        self._store = store
        self._file = AttemptFile(store.work / "limit.json", inputs)
        known = self._file.read() if resumes else None
        self.present = known or first
        self._plan: TriedPlan | None = None
        if known is None:
            store.forget_aside()  # what another conversion into the same folder may have left
        elif known.is_last:
            store.bring_back()  # where a killed run was about to; else there is nothing

    def obstacle(self, plan: TriedPlan) -> LooserOutcome | None:
        """Why the plan of the present attempt is not worth the recovery; None if it is."""
        self._plan = plan
        return self.present.obstacle(plan)

    def after_failure(self, promise: float, guard: GuardRecord, drops: Drops) -> bool:
        """Whether there is another attempt after one whose file loses more than promised."""
        if self.present.held is not None:
            return self.go_back(LooserOutcome.OVER_LIMIT, drops=drops)
        if is_beyond_transfer(promise, drops):
            return False
        return self._take(next_attempt(self.present, promise, guard.quality.drop_points, drops.file))

    def after_success(self, promise: float, guard: GuardRecord, drops: Drops) -> bool:
        """Whether a looser limit is worth an attempt after one that kept the promise."""
        if self.present.held is not None:
            self.present = self.present.settled(LooserOutcome.HANDED_OVER, self._with_drop(drops))
            return False
        plan = self._with_drop(drops)
        if plan is None:
            raise ContractError("no plan was tried")
        looser = looser_attempt(self.present, promise, guard.quality.drop_points, drops.file, plan)
        if looser is None:
            return False
        try:
            self._store.set_aside()
        except UsageError as error:  # the disk is full: what there is stands
            self.present = looser.settled(LooserOutcome.FAILED, None, str(error))
            return False
        return self._take(looser)

    def after_nothing(self, promise: float, guard: GuardRecord) -> bool:
        """Whether there is another attempt after one that left nothing to replace."""
        if self.present.held is not None:
            return self.go_back(LooserOutcome.NOT_CHEAPER)
        is_tightened = guard.limit_points is not None and guard.limit_points < promise
        return self._take(without_recovery(promise) if self.present.is_recovering and is_tightened else None)

    def go_back(self, outcome: LooserOutcome, *, drops: Drops | None = None, error: str = "") -> bool:
        """Bring back what kept the promise, and remember why; True, for that is one more attempt."""
        settled = self.present.settled(outcome, self._with_drop(drops), error)
        self._take(settled)  # first, so that a run that is killed in between goes on here
        self._store.bring_back()
        return True

    def finish(self) -> None:
        """The present attempt stands."""
        self._store.forget_aside()
        self._file.write(replace(self.present, is_last=True, held=None))

    def _with_drop(self, drops: Drops | None) -> TriedPlan | None:
        """The plan of the present attempt with what its file loses, once it has one."""
        if self._plan is None or drops is None:
            return self._plan
        return replace(self._plan, drop_points=drops.file)

    def _take(self, attempt: Attempt | None) -> bool:
        if attempt is None:
            return False
        self.present, self._plan = attempt, None
        self._file.write(attempt)
        return True


def limit_options(options: ConvertOptions, inputs: Inputs, hook: Hook | None) -> dict[str, object]:
    """What the limit that the guard ends up with depends on, besides the network."""
    return {
        "scheme": options.scheme,
        "options": repr(options.scheme_options),
        "includes_linear": options.includes_linear,
        "transfer": options.transfer,
        "reconstruct": repr(options.reconstruct),
        "train": None if inputs.train is None else inputs.train.sha256,
        "training": repr(options.training),
        "hook": None if hook is None else hook.name,
        "hook_key": None if hook is None else hook.key,
        "selection": repr(options.selection) if options.selects else None,
        "plan": None if options.plan is None else sha256_of_file(options.plan),
        "max_drop": options.max_drop_points,
        "recoverable": options.recoverable_points,
        "lowering": options.lowering,
        "int8": repr(options.int8),
        "target": options.target,
        "precision": options.precision.value,
        "mixed": options.mixed,
        "calibration": inputs.calibration.sha256,
        "validation": inputs.validation.sha256,
        "versions": versions(),
    }
