"""The guard: grow the set of replaced convolutions only as far as the measured drop allows.

Convolutions are ordered by damage: the change of the network's output with one of them replaced alone, per
multiply-accumulate saved. The longest prefix of that order that holds the limit is found by bisection, then single
convolutions behind it are tried. Every set is transferred anew and measured on the validation images: quickly while
searching, which loses a little more than the full transfer of the network handed over. An evaluation that is clearly
decided ends early, but that network has always been measured on all images.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from dataclasses import dataclass

from torch import nn

from sepdeploy.analyze.damage import network_damage
from sepdeploy.core.conv import Trace
from sepdeploy.core.measurement import Quality
from sepdeploy.core.plan import Kept, Plan, Reason
from sepdeploy.core.report import GuardStep, LayerTransfer
from sepdeploy.planning.convert import TransferMemory, convert_network
from sepdeploy.planning.evaluate import Evaluator, first_images
from sepdeploy.transfer.layer import Batches, TransferMethod

__all__ = ["GuardMemory", "Guarded", "guard_plan"]

GuardMemory = MutableMapping[str, float | GuardStep]
"""What was measured already, by what: lets a killed run resume. Damages and steps only, no weights."""

_FILL_TRIES = 3
"""Single convolutions tried behind the longest prefix, those of least damage first."""

_HOPEFUL = 2.0
"""The whole plan is transferred in full where the quick transfer loses at most so many times the limit."""

_DAMAGE_MACS = 2e11
"""Work per damage measurement: fewer images for larger networks."""

_DAMAGE_IMAGES = (32, 256)


@dataclass(frozen=True, slots=True)
class Guarded:
    """The network that holds the limit.

    Attributes:
        plan: What was replaced, and why the rest was kept.
        network: The converted network.
        transfers: Quality of each replaced layer.
        steps: Every set that was measured, in order.
        quality: Of the network, on all validation images.
    """

    plan: Plan
    network: nn.Module
    transfers: tuple[LayerTransfer, ...]
    steps: tuple[GuardStep, ...]
    quality: Quality


def guard_plan(
    original: nn.Module,
    trace: Trace,
    plan: Plan,
    batches: Batches,
    evaluator: Evaluator,
    *,
    max_drop_points: float | None,
    method: TransferMethod = "anchored",
    memory: GuardMemory | None = None,
    progress: Callable[[str], None] | None = None,
) -> Guarded:
    """Carry out as much of `plan` as the limit allows.

    Args:
        original: The trained network in eval mode.
        trace: Its trace.
        plan: What could be replaced.
        batches: Calibration images for the transfer and the damages.
        evaluator: Measures on the validation images.
        max_drop_points: Limit of `Quality.drop_points`; None replaces everything in the plan, whatever it costs.
        method: How weights are found.
        memory: What an earlier run with the same inputs measured; it is extended.
        progress: Called with a line of text before each longer step.

    Returns:
        A network whose measured drop is at most the limit; with nothing replaced it is the original itself.
    """
    run = _Run(original, trace, plan, batches, evaluator, max_drop_points, method, {} if memory is None else memory)
    run.progress = progress or run.progress
    candidates = tuple(plan.replaced)
    if max_drop_points is None or not candidates:
        return run.finish(candidates)
    quick = run.measure(candidates, candidates)
    is_near = method != "data-free" and quick.drop_points <= _HOPEFUL * max_drop_points
    if quick.is_accepted or (is_near and run.measure(candidates, candidates, is_quick=False).is_accepted):
        guarded = run.finish(candidates)
        if guarded.quality.drop_points <= max_drop_points:
            return guarded
        run.steps = list(guarded.steps)  # an early acceptance that all images overruled
    damages = {name: run.damage(name) for name in candidates}
    saved = {name: trace.site(name).macs - plan.replaced[name].macs for name in candidates}
    order = sorted(candidates, key=lambda name: (damages[name] / saved[name], name))
    run.accept_longest_prefix(order)
    run.fill(sorted((name for name in order if name not in run.accepted), key=lambda name: (damages[name], name)))
    return run.finish_within_limit(order)


class _Run:
    """State of one guard run."""

    def __init__(
        self,
        original: nn.Module,
        trace: Trace,
        plan: Plan,
        batches: Batches,
        evaluator: Evaluator,
        limit: float | None,
        method: TransferMethod,
        memory: GuardMemory,
    ) -> None:
        self.original, self.trace, self.plan, self.batches = original, trace, plan, batches
        self.evaluator, self.limit, self.method, self.memory = evaluator, limit, method, memory
        self.progress: Callable[[str], None] = lambda _text: None
        self.accepted: tuple[str, ...] = ()
        self.steps: list[GuardStep] = []
        self.details: dict[str, str] = {}
        self.untried: set[str] = set()
        self._transfers: dict[bool, TransferMemory] = {True: {}, False: {}}  # quick, in full
        self._full: dict[frozenset[str], Quality] = {frozenset(): evaluator.original_quality()}

    def build(self, names: Sequence[str], *, is_quick: bool) -> tuple[nn.Module, tuple[LayerTransfer, ...]]:
        """The network with exactly `names` replaced."""
        return convert_network(
            self.original,
            self.trace,
            self._plan_for(names),
            self.batches,
            method=self.method,
            memory=self._transfers[is_quick],
            is_quick=is_quick,
        )

    def measure(self, names: Sequence[str], added: Sequence[str], *, is_quick: bool = True) -> GuardStep:
        """Whether the network with `names` replaced holds the limit; records the step."""
        assert self.limit is not None
        key = f"{self.limit!r}{'' if is_quick else ' in full'}: " + " ".join(sorted(names))
        known = self.memory.get(key)
        if not isinstance(known, GuardStep):
            self.progress(f"guard: {len(names)} of {len(self.plan.replaced)} convolutions replaced")
            network, _ = self.build(names, is_quick=is_quick)
            quality, is_partial = self.evaluator.quality(network, self.limit)
            known = GuardStep(
                added=tuple(added),
                replaced=len(names),
                drop_points=quality.drop_points,
                images=quality.images,
                is_accepted=quality.drop_points <= self.limit,
                is_partial=is_partial,
            )
            self.memory[key] = known
            if not is_partial and not is_quick:
                self._full[frozenset(names)] = quality
        if known not in self.steps:
            self.steps.append(known)
        return known

    def damage(self, name: str) -> float:
        """Change of the network's output with `name` alone replaced, on calibration images (`network_damage`)."""
        known = self.memory.get(f"damage {name}")
        if isinstance(known, float):
            return known
        self.progress(f"guard: damage of {name}")
        network, _ = self.build([name], is_quick=True)
        low, high = _DAMAGE_IMAGES
        images = int(min(high, max(low, _DAMAGE_MACS // max(self.trace.total_macs, 1))))
        value = network_damage(self.original, network, first_images(self.batches(), images))
        self.memory[f"damage {name}"] = value
        return value

    def accept_longest_prefix(self, order: Sequence[str]) -> None:
        """Bisect for the longest prefix of `order` that holds; the whole is known not to."""
        low, high = 0, len(order)
        while high - low > 1:
            middle = (low + high) // 2
            if self.measure(order[:middle], order[low:middle]).is_accepted:
                low = middle
            else:
                high = middle
        self.accepted = tuple(order[:low])

    def fill(self, rest: Sequence[str]) -> None:
        """Try the convolutions behind the prefix one by one."""
        for tries, name in enumerate(rest):
            if tries >= _FILL_TRIES:
                self.untried.add(name)
                continue
            step = self.measure((*self.accepted, name), (name,))
            if step.is_accepted:
                self.accepted = (*self.accepted, name)
            else:
                self.details[name] = self._detail(step.drop_points, step.replaced, step.images)

    def finish_within_limit(self, order: Sequence[str]) -> Guarded:
        """Measure the accepted set on all images, giving up the last convolution while the limit is broken."""
        assert self.limit is not None
        while self.accepted:
            guarded = self.finish(self.accepted)
            if guarded.quality.drop_points <= self.limit:
                return guarded
            worst = max(self.accepted, key=order.index)
            quality = guarded.quality
            self.details[worst] = self._detail(quality.drop_points, len(self.accepted), quality.images)
            self.steps = list(guarded.steps)
            self.accepted = tuple(name for name in self.accepted if name != worst)
        return self.finish(())

    def finish(self, names: Sequence[str]) -> Guarded:
        """The network with `names` replaced, measured on all images."""
        self.progress(f"guard: measuring the network with {len(names)} convolutions replaced on all images")
        network, transfers = self.build(names, is_quick=False)
        quality = self._full.get(frozenset(names)) or self.evaluator.quality(network)[0]
        is_accepted = self.limit is None or quality.drop_points <= self.limit
        step = GuardStep((), len(names), quality.drop_points, quality.images, is_accepted)
        is_new = all(s.is_partial or (s.replaced, s.drop_points) != (len(names), step.drop_points) for s in self.steps)
        steps = (*self.steps, step) if is_new else tuple(self.steps)
        return Guarded(self._plan_for(names), network, transfers, steps, quality)

    def _detail(self, drop_points: float, replaced: int, images: int) -> str:
        others = f"{replaced - 1} others replaced, on {images} images"
        return f"{drop_points:.2f} points with it and {others}; the limit is {self.limit:g}"

    def _kept(self, name: str) -> Kept:
        if name in self.untried:
            return Kept(Reason.NOT_TRIED, f"{_FILL_TRIES} convolutions of less damage alone came first")
        return Kept(Reason.EXCEEDS_MAX_DROP, self.details.get(name, ""))

    def _plan_for(self, names: Sequence[str]) -> Plan:
        """The plan with only `names` replaced and the rest kept because of the limit."""
        plan = self.plan
        for name in self.plan.replaced:
            if name not in names:
                plan = plan.with_outcome(name, self._kept(name))
        return plan
