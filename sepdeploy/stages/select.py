"""Choose a form for every layer, and check the choice as a whole against the clock."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import cast

import torch
from torch import nn

from sepdeploy.core.artifact import Precision
from sepdeploy.core.codec import read_json, to_json, write_json
from sepdeploy.core.conv import Trace
from sepdeploy.core.files import sha256_of_bytes
from sepdeploy.core.measurement import Measured, Method, Quality
from sepdeploy.core.memory import BYTES_PER_VALUE
from sepdeploy.core.options import ConvertOptions
from sepdeploy.core.pareto import FrontPoint
from sepdeploy.core.plan import Candidate, Kept, Plan, Reason, lowered_for
from sepdeploy.core.progress import Progress
from sepdeploy.core.report import SelectionSummary
from sepdeploy.core.selection import Choice, LayerChoices, Selection
from sepdeploy.core.stage_store import StageStore
from sepdeploy.errors import ContractError, UsageError
from sepdeploy.planning.evaluate import Evaluator, batch_size_for, tensor_batches
from sepdeploy.planning.guard import Guarded, GuardMemory
from sepdeploy.planning.select import Search
from sepdeploy.planning.solve import Limits, Solution, UnreachableLimitError
from sepdeploy.stages.bundle import read_weights, rebuild, save_weights
from sepdeploy.stages.guard import GuardRecord, MemoryFile, guard_files
from sepdeploy.stages.load import Inputs
from sepdeploy.stages.weigh import damage_key
from sepdeploy.transfer.layer import TransferMethod

__all__ = ["measure_front", "run_selection", "with_plan"]

_MIN_SPEEDUP = 1.0
"""The lower end of the measured interval must be above it, else the plan falls back."""

_FALLBACK_SHARE = 4
"""Of the layers replaced, one in so many is given up at a time, at least one: those of the least sure gain."""

_FRONT_IMAGES = 2000
"""Validation images for plans that are only looked at."""

_LATENCY_TRIES = 3
"""Plans solved anew because the whole was slower than the sum of its parts."""


def run_selection(
    store: StageStore,
    options: ConvertOptions,
    inputs: Inputs,
    traced: Trace,
    weighed: Selection,
    evaluator: Evaluator,
    limit_points: float | None,
    timed: Callable[[Plan, nn.Module], Measured],
    progress: Progress,
) -> tuple[Plan, nn.Module, GuardRecord]:
    """Choose, and give up what does not make the whole faster; plan.json, work/transferred.pt and work/guard.json.

    Args:
        store: Remembers what was made from what.
        options: What is converted and how.
        inputs: The network and its images.
        traced: Its trace.
        weighed: What `weigh` returned.
        evaluator: Measures on the validation images.
        limit_points: Most that the network may lose before recovery; None where cost is limited instead.
        timed: Measures the target's file of a plan's network, interleaved with the original's.
        progress: Told what is going on.
    """
    files = guard_files(store.folder)
    basis: dict[str, object] = {
        **damage_key(options, inputs),
        "weighed": sha256_of_bytes(to_json(weighed).encode()),
        "selection": repr(options.selection),
        "lowering": options.lowering,
        "validation": inputs.validation.sha256,
        "transfer": options.transfer,
        "threads": [torch.get_num_threads(), options.threads],
    }

    def make() -> None:
        memory = MemoryFile(store.work / "guard_memory.json", basis)
        search = _search(options, inputs, traced, weighed, evaluator, memory, progress)
        run = _Run(options, weighed, search, traced, limit_points, timed, progress)
        guarded, record = run.result()
        store.before_change()
        save_weights(files[1], guarded.network)
        write_json(files[0], guarded.plan)
        write_json(files[2], GuardRecord(guarded.transfers, guarded.steps, guarded.quality, limit_points, record))

    store.run("guard", {**basis, "limit": limit_points}, files, make)
    plan = read_json(Plan, files[0])
    return plan, rebuild(inputs.network, plan, read_weights(files[1])), read_json(GuardRecord, files[2])


class _Run:
    """One choice and its check by the clock."""

    def __init__(
        self,
        options: ConvertOptions,
        weighed: Selection,
        search: Search,
        traced: Trace,
        limit_points: float | None,
        timed: Callable[[Plan, nn.Module], Measured],
        progress: Progress,
    ) -> None:
        self.options, self.weighed, self.search, self.traced = options, weighed, search, traced
        self.limit_points, self.timed, self.progress = limit_points, timed, progress

    def result(self) -> tuple[Guarded, SelectionSummary]:
        """The network to hand over, and how its cost was predicted and measured."""
        guarded = self._chosen()
        wanted = self.options.selection
        if wanted.takes_slower_forms:
            return guarded, self._record(guarded.plan, None, ())  # what is given up would break what was asked for
        plan, network = guarded.plan, guarded.network
        given_up: tuple[str, ...] = ()
        latency = None
        while plan.replaced:
            latency = self.timed(plan, network)
            if latency.speedup_low is not None and latency.speedup_low > _MIN_SPEEDUP:
                break
            weakest = self._weakest(plan)
            given_up += weakest
            self.progress.stage(f"selection: the whole is not faster, giving up {', '.join(weakest)}")
            for name in weakest:
                measured = f"{latency.speedup_low:.2f} to {latency.speedup_high:.2f}x the original's speed with it"
                plan = plan.with_outcome(name, Kept(Reason.NOT_FASTER_WHOLE, measured))
            latency = None
            if plan.replaced:
                network = self.search.sketch(plan)  # weights are no matter to the clock
        if given_up:
            guarded = self.search.finish(plan, self.limit_points)
        return guarded, self._record(plan, latency, given_up)

    def _chosen(self) -> Guarded:
        """The plan by the options' goal and limits; a limit of latency is checked on the whole and solved anew."""
        if not self.options.selection.has_limit:
            if self.limit_points is None:
                raise ContractError("a selection without any limit")
            return self.search.within_drop(self.limit_points)
        limits = _limits_of(self.options, self.weighed, self.traced)
        wanted = limits.latency
        plan = None
        for _ in range(_LATENCY_TRIES):
            self.search.limits = limits
            try:
                plan = self.search.least_damage()
            except UnreachableLimitError as error:
                if plan is None or error.measure != "latency":
                    raise _unreachable(error, self.weighed, self.traced, self.options.precision) from error
                # Not even the fastest plan is predicted to make up for what the whole takes longer: it comes nearest,
                # and the report says by how much it misses.
                self.search.limits = replace(limits, latency=error.least)
                plan = self.search.least_damage()
                break
            if wanted is None or not plan.replaced:
                break
            latency = self.timed(plan, self.search.sketch(plan))
            # By the speed-up: the machine may be faster or slower now than when the table was made. By its lower end:
            # what is handed over is measured once more, and has to hold the limit then.
            reached = self.weighed.original_cost / (latency.speedup_low or 1.0) - self.weighed.original_cost
            if reached <= wanted:
                break
            limits = replace(limits, latency=wanted - (reached - self._difference(plan)))
        if plan is None:
            raise ContractError("no plan was tried")
        return self.search.finish(plan, None)

    def _weakest(self, plan: Plan) -> tuple[str, ...]:
        """The replaced layers of the least sure gain."""
        gains = {name: self._choice(name, candidate).difference_high for name, candidate in plan.replaced.items()}
        order = sorted(gains, key=lambda name: -gains[name])
        return tuple(order[: max(1, len(order) // _FALLBACK_SHARE)])

    def _choice(self, name: str, candidate: Candidate) -> Choice:
        layer = next(layer for layer in self.weighed.layers if layer.name == name)
        return next(
            choice
            for choice in layer.choices
            if choice.candidate is not None
            and (choice.candidate.form, choice.lowering) == (candidate.form, candidate.lowering)
        )

    def _difference(self, plan: Plan) -> float:
        """Predicted change of the whole's cost."""
        return sum(self._choice(name, candidate).difference for name, candidate in plan.replaced.items())

    def _solver_notes(self) -> tuple[str, ...]:
        if not self.search.gap:
            return ()
        return (f"the solver ran out of time: another plan may be better by up to {100 * self.search.gap:.2g}%",)

    def _record(self, plan: Plan, latency: Measured | None, given_up: tuple[str, ...]) -> SelectionSummary:
        return SelectionSummary(
            unit=self.weighed.unit,
            original_cost=self.weighed.original_cost,
            predicted_cost=self.weighed.original_cost + self._difference(plan),
            measured_cost=None if latency is None else latency.cost,
            speedup=None if latency is None else latency.speedup,
            speedup_low=None if latency is None else latency.speedup_low,
            speedup_high=None if latency is None else latency.speedup_high,
            given_up=given_up,
            notes=(*self.weighed.notes, *self._solver_notes()),
        )


def _sure(layer: LayerChoices, method: Method = Method.WALL_CLOCK) -> LayerChoices:
    """Only forms that are faster by the whole of their interval: of many that are none, some always look faster."""
    interval = "95% interval" if method is Method.WALL_CLOCK else "modelled range"
    dense, *others = layer.choices
    sure = [choice for choice in others if choice.difference_high < 0]
    if sure or not others or layer.kept is not None:
        return replace(layer, choices=(dense, *sure))
    best = min(others, key=lambda choice: choice.difference_high)
    numbers = (
        f"{best.label}: {best.difference:+.3g}, {interval} {best.difference_low:+.3g} to {best.difference_high:+.3g}"
    )
    return replace(layer, choices=(dense,), kept=Kept(Reason.NOT_FASTER, numbers))


def _limits_of(options: ConvertOptions, weighed: Selection, traced: Trace) -> Limits:
    """The user's limits in the terms of the solver: differences of the whole, and the layers' own parameters."""
    wanted = options.selection
    latency = params = None
    if wanted.max_latency is not None:
        latency = wanted.max_latency - weighed.original_cost
    if wanted.max_latency_ratio is not None:
        latency = (wanted.max_latency_ratio - 1) * weighed.original_cost
    if wanted.max_size_bytes is not None:
        rest = traced.total_params - sum(layer.choices[0].params for layer in weighed.layers)
        params = wanted.max_size_bytes // BYTES_PER_VALUE[options.precision] - rest
    return Limits(latency=latency, params=params, peak_bytes=wanted.max_memory_bytes)


def _unreachable(error: UnreachableLimitError, weighed: Selection, traced: Trace, precision: Precision) -> UsageError:
    """The same in the terms of the user's limits."""
    if error.measure == "latency":
        least = weighed.original_cost + error.least
        return UsageError(
            f"the limit of latency cannot be reached: the fastest plan is predicted at {least:.3g} {weighed.unit}, the "
            f"original takes {weighed.original_cost:.3g}; raise --max-latency or --max-ratio"
        )
    if error.measure == "params":
        rest = traced.total_params - sum(layer.choices[0].params for layer in weighed.layers)
        least_bytes = BYTES_PER_VALUE[precision] * (rest + int(error.least))
        return UsageError(f"--max-size cannot be reached: the smallest plan has {least_bytes:,} bytes of weights")
    return UsageError(f"--max-memory cannot be reached: the least peak of activations is {int(error.least):,} bytes")


def with_plan(weighed: Selection, plan: Plan) -> Selection:
    """What was weighed, with the choices of a plan."""
    replaced = plan.replaced
    chosen = {}
    for layer in weighed.layers:
        candidate = replaced.get(layer.name)
        chosen[layer.name] = next(
            choice.label
            for choice in layer.choices
            if (choice.candidate and choice.candidate.form) == (candidate and candidate.form)
        )
    taken_back = {
        name: f"{kept.reason.value} ({kept.detail})"
        for name, kept in plan.kept.items()
        if kept.reason is Reason.NOT_FASTER_WHOLE
    }
    return replace(weighed, chosen=chosen, taken_back=taken_back)


def measure_front(
    options: ConvertOptions,
    inputs: Inputs,
    traced: Trace,
    weighed: Selection,
    evaluator: Evaluator,
    points: int,
    progress: Progress,
) -> tuple[FrontPoint, ...]:
    """The original, plans between it and the cheapest, and the chosen one: predicted cost, measured quality.

    Args:
        options: What is converted and how.
        inputs: The network and its images.
        traced: Its trace.
        weighed: What was weighed and chosen.
        evaluator: Measures on the validation images.
        points: Plans besides; 0 measures nothing and returns nothing.
        progress: Told what is going on.
    """
    if points == 0:
        return ()
    search = _search(options, inputs, traced, weighed, evaluator, {}, progress)
    quality, _ = evaluator.quality(inputs.network, most=_FRONT_IMAGES)  # on the images of the others
    rest_macs = traced.total_macs - sum(layer.choices[0].macs for layer in weighed.layers)
    rest_params = traced.total_params - sum(layer.choices[0].params for layer in weighed.layers)
    bytes_each = BYTES_PER_VALUE[options.precision]

    def point(name: str, solution: Solution, quality: Quality, *, is_chosen: bool = False) -> FrontPoint:
        is_original = not any(choice.candidate for choice in solution.chosen.values())
        cost = weighed.original_cost + solution.difference
        return FrontPoint(
            name=name,
            latency=cost,
            unit=weighed.unit,
            speedup=weighed.original_cost / cost if cost > 0 else math.inf,
            damage=solution.damage,
            accuracy_ratio=quality.accuracy_ratio,
            drop_points=quality.drop_points,
            size_bytes=bytes_each * (rest_params + solution.params),
            macs=rest_macs + solution.macs,
            is_chosen=is_chosen,
            is_predicted=not is_original,
            is_original=is_original,
        )

    found = [point("original", search.nothing(), quality)]
    for solution, measured in search.front(points, _FRONT_IMAGES):
        replaced = sum(choice.candidate is not None for choice in solution.chosen.values())
        if replaced:
            name = f"{replaced} of {len(solution.chosen)} replaced"
            found.append(point(name, solution, measured, is_chosen=solution.chosen == weighed.choices))
    if not any(each.is_chosen for each in found):
        solution, measured = search.measured(weighed.choices, _FRONT_IMAGES)
        found.append(point("chosen", solution, measured, is_chosen=True))
    return tuple(sorted(found, key=lambda each: -each.latency))


def _search(
    options: ConvertOptions,
    inputs: Inputs,
    traced: Trace,
    weighed: Selection,
    evaluator: Evaluator,
    memory: GuardMemory,
    progress: Progress,
) -> Search:
    return Search(
        inputs.network,
        traced,
        weighed.layers
        if options.selection.takes_slower_forms
        else tuple(_sure(layer, weighed.method) for layer in weighed.layers),
        weighed.unit,
        lowered_for(weighed.target, weighed.precision),
        tensor_batches(inputs.calibration, batch_size_for(traced)),
        evaluator,
        minimize=options.selection.goal,
        limits=Limits(),
        method=cast("TransferMethod", options.transfer),
        memory=memory,
        progress=progress.stage,
    )
