"""Which limits the guard is given, one after the other, until the target's file holds --max-drop.

The guard measures the network right after the transfer. What comes later moves the drop both ways: reconstruction and
training win points back, int8 loses some. So the first limit is `--max-drop` plus what recovery usually wins, and each
next one is tighter by what the file lost too much. If recovery has not kept the promise after four attempts, three if
each means another training, the guard does what it would have done without it: a promise that can be kept without
recovery is not broken by trying.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from sepdeploy.core.codec import read_json, to_data, write_json
from sepdeploy.core.files import sha256_of_file
from sepdeploy.core.options import ConvertOptions
from sepdeploy.errors import UsageError
from sepdeploy.stages.load import Inputs
from sepdeploy.stages.versions import versions
from sepdeploy.train.hooks import Hook

__all__ = ["Attempt", "AttemptFile", "first_attempt", "limit_options", "next_attempt", "without_recovery"]

_MAX_TIGHTENINGS = 2
_MAX_TIGHTENINGS_OF_RECONSTRUCTION = 3
"""The last one counts on nothing, so one more lets the estimate follow the network; reconstruction takes minutes."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """One try to hold --max-drop.

    Attributes:
        limit_points: Limit of the guard; None if there is none.
        is_recovering: Whether reconstruction and training follow.
        tightenings: How often the limit was made tighter before.
        most_tightenings: How often it may be.
        is_last: Whether its result stands, whatever it is.
        recovering_limit_points: Limit of the last attempt with recovery, once that was given up.
    """

    limit_points: float | None
    is_recovering: bool
    tightenings: int = 0
    most_tightenings: int = _MAX_TIGHTENINGS
    is_last: bool = False
    recovering_limit_points: float | None = None


def first_attempt(options: ConvertOptions, *, is_trained: bool) -> Attempt:
    """Where to begin, given whether the network is fine-tuned."""
    is_recovering = options.reconstructs or is_trained
    if options.max_drop_points is None:
        return Attempt(None, is_recovering)
    most = _MAX_TIGHTENINGS_OF_RECONSTRUCTION if is_recovering and not is_trained else _MAX_TIGHTENINGS
    limit = options.max_drop_points + options.slack_points(is_trained=is_trained)
    return Attempt(limit, is_recovering, most_tightenings=most)


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
        return replace(attempt, limit_points=limit, tightenings=attempt.tightenings + 1)
    if attempt.is_recovering:
        return replace(without_recovery(max_drop_points), recovering_limit_points=attempt.limit_points)
    if attempt.recovering_limit_points is not None:
        # Broken either way: then rather with what was won back. Its training is still there, so this costs little.
        return Attempt(attempt.recovering_limit_points, is_recovering=True, is_last=True)
    return None


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
