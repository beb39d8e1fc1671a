"""Price every form of every layer on the target, and measure the damage that it does."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from sepdeploy.analyze.activation import find_activations
from sepdeploy.analyze.liveness import measure_memory
from sepdeploy.core.artifact import Precision
from sepdeploy.core.codec import read_json, write_json
from sepdeploy.core.conv import Trace
from sepdeploy.core.options import AUTO, ConvertOptions
from sepdeploy.core.plan import Candidate, Decision, Plan, Replaced, SchemeOptions
from sepdeploy.core.price_cache import PriceCache
from sepdeploy.core.progress import Progress, Silent
from sepdeploy.core.selection import Activation, Choice, FusedBlock, LayerChoices, Price, Selection
from sepdeploy.core.stage_store import StageStore
from sepdeploy.errors import ContractError, UsageError
from sepdeploy.planning.candidates import drop_failing
from sepdeploy.planning.choices import LayerForms, TargetLowerings, propose_choices
from sepdeploy.planning.damage import measure_damages
from sepdeploy.planning.evaluate import batch_size_for, tensor_batches
from sepdeploy.planning.fused_block import blocks_of_site, dense_form
from sepdeploy.planning.memory import memory_with_candidates
from sepdeploy.planning.price import NOT_MEASURED, first_reason, price_blocks
from sepdeploy.planning.target import Target, find_target
from sepdeploy.render.format_numbers import plural
from sepdeploy.stages.launch import Processes
from sepdeploy.stages.load import Inputs
from sepdeploy.stages.recover import held_out_images

__all__ = ["damage_key", "share_damages", "weigh"]


@dataclass(frozen=True, slots=True)
class _Damages:
    """Layer -> label -> damage, as a file."""

    damages: dict[str, dict[str, float]]


def weigh(
    store: StageStore,
    options: ConvertOptions,
    inputs: Inputs,
    traced: Trace,
    original_cost: Callable[[], float],
    processes: Processes,
    progress: Progress,
) -> Selection:
    """Price every form of every layer on the target and measure its damage; work/selection.json, nothing chosen yet.

    Args:
        store: Remembers what was made from what.
        options: What is converted and how.
        inputs: The network and its images.
        traced: Its trace.
        original_cost: Measures the whole original network on the target, median.
        processes: Those that share the damages; all but this one, the first, call `share_damages`.
        progress: Told what is going on.

    Raises:
        ToolError: if the target's runtime is not there.
    """
    path = store.work / "selection.json"
    target = find_target(options.target, options.precision, options.threads)
    key = {
        **damage_key(options, inputs),
        "target": target.key(),
        "lowering": options.lowering,
        "memory": options.selection.max_memory_bytes is not None,
        "seconds": [options.selection.seconds_per_block, options.selection.pricing_seconds],
        "takes_slower_forms": options.selection.takes_slower_forms,
    }

    def make() -> None:
        progress.stage("selection: candidates")
        fit = tensor_batches(held_out_images(inputs, options.seed)[0], batch_size_for(traced))
        lowerings = target.lowerings if options.lowering is None else _the_users(options.lowering)
        forms = propose_choices(traced, inputs.network, lowerings, fit, progress=progress.step)
        forms = _without_failing(forms, inputs, traced)
        damages = _measured_damages(store, options, inputs, traced, forms, processes, progress)
        prices = _measured_prices(options, inputs, traced, forms, target, progress)
        layers = tuple(_layer_choices(each, traced, prices, damages) for each in forms)
        if options.selection.max_memory_bytes is not None:
            progress.stage("selection: activation memory")
            layers = _with_peaks(layers, inputs, traced, options.precision)
        chosen = {layer.name: layer.choices[0].label for layer in layers}
        selection = Selection(
            chosen=chosen,
            model_sha256=inputs.model_sha256,
            target=target.name,
            precision=options.precision,
            threads=options.threads,
            unit=target.unit,
            method=target.method,
            original_cost=original_cost(),
            layers=layers,
            notes=prices.notes,
            takes_slower_forms=options.selection.takes_slower_forms,
        )
        # What can never be measured here must not start all that follows anew, only for another time of the original.
        is_known = lacking is not None and replace(selection, original_cost=lacking.original_cost) == lacking
        write_json(path, lacking if is_known else selection)

    lacking = _lacking_prices(path)
    if lacking is not None:
        store.forget("weigh")
    if not store.run("weigh", key, (path,), make):
        processes.told(())  # nothing to measure
    return read_json(Selection, path)


def _the_users(lowering: tuple[str, ...]) -> TargetLowerings:
    """What the user wants all forms to be written down as is what is priced."""
    return lambda _form: (lowering,)


def _lacking_prices(path: Path) -> Selection | None:
    """What was weighed before, if prices were not measured for want of time, memory or disk: those are tried again."""
    try:
        weighed = read_json(Selection, path)
    except UsageError:  # not there or damaged: made anew in any case
        return None
    is_lacking = any(why.startswith(NOT_MEASURED) for layer in weighed.layers for why in layer.refused.values())
    return weighed if is_lacking else None


def damage_key(options: ConvertOptions, inputs: Inputs) -> dict[str, object]:
    """What the damages depend on, whatever the target."""
    return {
        **inputs.network_key(),
        "includes_linear": options.includes_linear,
        "calibration": inputs.calibration.sha256,
        "seed": options.seed,
    }


def _measured_damages(
    store: StageStore,
    options: ConvertOptions,
    inputs: Inputs,
    traced: Trace,
    forms: Sequence[LayerForms],
    processes: Processes,
    progress: Progress,
) -> dict[str, dict[str, float]]:
    """Layer -> label -> damage; work/damages.json, the same for every target."""
    path = store.work / "damages.json"

    def make() -> None:
        progress.stage("selection: damage of every candidate")
        processes.told(forms)
        found = _shared_damages(options, inputs, traced, forms, processes, progress)
        damages: dict[str, dict[str, float]] = {}
        for (layer, label), value in found.items():
            damages.setdefault(layer, {})[label] = value
        write_json(path, _Damages(damages))

    labels = {each.name: [label for label, *_ in each.forms] for each in forms}
    if not store.run("damage", {**damage_key(options, inputs), "labels": labels}, (path,), make):
        processes.told(())  # nothing to measure
    return read_json(_Damages, path).damages


def share_damages(options: ConvertOptions, inputs: Inputs, traced: Trace, processes: Processes) -> None:
    """Measure this process' share of the damages, once the first process says of what."""
    forms = processes.told(None)
    if forms:
        _shared_damages(options, inputs, traced, forms, processes, Silent())


def _shared_damages(
    options: ConvertOptions,
    inputs: Inputs,
    traced: Trace,
    forms: Sequence[LayerForms],
    processes: Processes,
    progress: Progress,
) -> dict[tuple[str, str], float]:
    fit, held_out = (tensor_batches(s, batch_size_for(traced)) for s in held_out_images(inputs, options.seed))
    return measure_damages(
        inputs.network,
        traced,
        forms,
        fit,
        held_out,
        progress=progress.step,
        rank=processes.rank,
        processes=processes.count,
        gather=processes.gathered,
    )


def _without_failing(forms: tuple[LayerForms, ...], inputs: Inputs, traced: Trace) -> tuple[LayerForms, ...]:
    """The same, but layers that cannot be swapped without the network noticing stay, with the reason."""
    first = {each.name: each.forms[0].candidate for each in forms if each.forms}
    decisions = tuple(
        Decision(s.name, s.macs, s.params, Replaced(first[s.name])) for s in traced.sites if s.name in first
    )
    tried = drop_failing(inputs.network, traced, Plan(AUTO, SchemeOptions(), decisions), inputs.example())
    return tuple(replace(e, forms=(), kept=tried.kept[e.name]) if e.name in tried.kept else e for e in forms)


def _measured_prices(
    options: ConvertOptions,
    inputs: Inputs,
    traced: Trace,
    forms: Sequence[LayerForms],
    target: Target,
    progress: Progress,
) -> _Prices:
    """What every block of every form costs on the target; kept in the user's cache."""
    activations = find_activations(inputs.network, inputs.example(), traced)
    groups: dict[FusedBlock, dict[FusedBlock, None]] = {}
    blocks = _Blocks(traced, activations)
    # Where the time may not last for all, there is most to gain in the largest.
    for each in sorted(forms, key=lambda each: -traced.site(each.name).macs):
        for _, candidate, lowerings in each.forms:
            for lowering in lowerings:
                for dense, block in blocks.pairs(each.name, candidate, lowering):
                    groups.setdefault(dense, {})[block] = None
    progress.stage(f"selection: prices on {target.name}, {options.precision.value}, {options.threads} threads")
    cache = PriceCache()
    found = price_blocks(
        target,
        {dense: tuple(others) for dense, others in groups.items()},
        cache,
        seconds_per_block=options.selection.seconds_per_block,
        budget_seconds=options.selection.pricing_seconds,
        progress=progress,
    )
    cache.close()
    return _Prices(blocks, found, (*cache.notes, *_missing_notes(found)))


@dataclass(frozen=True, slots=True)
class _Blocks:
    """The blocks that layers are made of, with what follows them.

    Attributes:
        traced: The network.
        activations: Layer -> what follows it.
    """

    traced: Trace
    activations: Mapping[str, Activation]

    def pairs(
        self, name: str, candidate: Candidate, lowering: tuple[str, ...]
    ) -> tuple[tuple[FusedBlock, FusedBlock], ...]:
        """(dense block, block of the form) of every call of the layer."""
        site = self.traced.site(name)
        activation = self.activations.get(name, "")
        if site.spec is None:
            raise ContractError(f"{name} has no geometry")
        dense = blocks_of_site(site, dense_form(site.spec), activation)
        return tuple(zip(dense, blocks_of_site(site, candidate.form, activation, lowering), strict=True))


def _missing_notes(found: Mapping[tuple[FusedBlock, FusedBlock], Price | str]) -> tuple[str, ...]:
    """How many forms the time or the machine did not last for."""
    missing = [why for why in found.values() if isinstance(why, str) and why.startswith(NOT_MEASURED)]
    if not missing:
        return ()
    reason = missing[0].removeprefix(NOT_MEASURED)
    return (f"{plural(len(missing), 'form')} of layers not measured ({reason})",)


@dataclass(frozen=True, slots=True)
class _Prices:
    """What forms cost.

    Attributes:
        blocks: Their blocks.
        found: (dense block, block) -> price, or why there is none.
        notes: What the user should know of how they came about.
    """

    blocks: _Blocks
    found: Mapping[tuple[FusedBlock, FusedBlock], Price | str]
    notes: tuple[str, ...]

    def of(self, name: str, candidate: Candidate, lowering: tuple[str, ...]) -> tuple[float, float, float] | str:
        """Difference to keeping the layer and its interval, over all calls; why not, if a block has no price."""
        prices = [self.found[pair] for pair in self.blocks.pairs(name, candidate, lowering)]
        reasons = [price for price in prices if isinstance(price, str)]
        if reasons:
            return first_reason(reasons)
        known = [price for price in prices if not isinstance(price, str)]
        return (
            sum(price.difference for price in known),
            sum(price.difference_low for price in known),
            sum(price.difference_high for price in known),
        )


def _layer_choices(
    forms: LayerForms, traced: Trace, prices: _Prices, damages: Mapping[str, Mapping[str, float]]
) -> LayerChoices:
    """Every form of one layer, written down in the way that costs least."""
    site = traced.site(forms.name)
    choices = [Choice("dense", None, (), 0.0, 0.0, 0.0, 0.0, site.macs, site.params)]
    refused = dict(forms.refused)
    for label, candidate, lowerings in forms.forms:
        costs = {lowering: prices.of(forms.name, candidate, lowering) for lowering in lowerings}
        known = {lowering: cost for lowering, cost in costs.items() if not isinstance(cost, str)}
        if not known:
            refused[label] = first_reason([cost for cost in costs.values() if isinstance(cost, str)])
            continue
        # By the end of the interval: the least of several medians is mostly the luckiest one.
        lowering = min(known, key=lambda each: known[each][2])
        damage = damages[forms.name][label]
        choices.append(Choice(label, candidate, lowering, *known[lowering], damage, candidate.macs, candidate.params))
    return LayerChoices(forms.name, tuple(choices), refused, forms.kept)


def _with_peaks(
    layers: tuple[LayerChoices, ...], inputs: Inputs, traced: Trace, precision: Precision
) -> tuple[LayerChoices, ...]:
    """The choices with the peak of the network's activations while each runs."""
    example = inputs.example()
    dense = measure_memory(inputs.network, example)
    result = []
    for layer in layers:
        choices = []
        for choice in layer.choices:
            profile = dense
            if choice.candidate is not None:
                profile = memory_with_candidates(inputs.network, traced, {layer.name: choice.candidate}, example)
            # A layer that no module runs keeps nothing alive that is not counted elsewhere.
            choices.append(replace(choice, peak_bytes=profile.module_peak_bytes(layer.name, precision) or 0))
        result.append(replace(layer, choices=tuple(choices)))
    return tuple(result)
