"""A conversion from the checkpoint to the report: the stages in their order."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from sepdeploy.analyze.trace import trace_network
from sepdeploy.core.artifact import Precision, Role
from sepdeploy.core.codec import read_json, to_json, write_json
from sepdeploy.core.conv import Trace
from sepdeploy.core.design import DesignOptions, DesignResult
from sepdeploy.core.files import sha256_of_bytes, sha256_of_file
from sepdeploy.core.int8 import PLAIN
from sepdeploy.core.looser_plan import LooserOutcome
from sepdeploy.core.manifest import RunRecord
from sepdeploy.core.measurement import Measured
from sepdeploy.core.options import ConvertOptions, MovedInputs, require_own_training, target_format
from sepdeploy.core.pareto import FrontPoint
from sepdeploy.core.passing_errors import is_passing
from sepdeploy.core.plan import Plan
from sepdeploy.core.progress import Progress, Silent
from sepdeploy.core.quiet import error_summary
from sepdeploy.core.report import ArtifactResult, Drops, Report
from sepdeploy.core.selection import Selection
from sepdeploy.core.stage_store import StageStore, locked, require_usable
from sepdeploy.core.training import TrainOptions
from sepdeploy.errors import ContractError, SepdeployError, UsageError
from sepdeploy.loading.checkpoint import load_state_dict
from sepdeploy.planning.design_network import design_network
from sepdeploy.planning.evaluate import Evaluator, batch_size_for, prefer_channels_last
from sepdeploy.planning.target import find_target
from sepdeploy.schemes.scheme import find_scheme
from sepdeploy.stages.after_transfer import given_hook, recover_without_labels, require_training, train_network
from sepdeploy.stages.attempts import Attempt, Attempts, first_attempt, limit_options
from sepdeploy.stages.deploy import deploy
from sepdeploy.stages.design import check_design_folder, write_design
from sepdeploy.stages.finish import discard_results, finish_bundle, measure_drops
from sepdeploy.stages.guard import TRANSFERRED, GuardRecord, propose, run_guard, trace
from sepdeploy.stages.inspect_model import inspect_model
from sepdeploy.stages.launch import Processes, joined_processes, launched_processes
from sepdeploy.stages.load import Inputs, load_inputs
from sepdeploy.stages.looser_plan import tried_plan
from sepdeploy.stages.measure import target_cost
from sepdeploy.stages.plan_file import read_given_plan, read_plan_file
from sepdeploy.stages.recover import Recovered, Recovery, Weights
from sepdeploy.stages.reopen import (
    RECORD,
    absolute_options,
    open_record,
    read_conversion,
    read_plan,
    require_unchanged,
    with_training,
)
from sepdeploy.stages.report import target_result
from sepdeploy.stages.select import measure_front, run_selection, with_plan
from sepdeploy.stages.weigh import share_damages, weigh
from sepdeploy.train.hooks import FinetuneHook, Hook

__all__ = ["adopt", "convert", "design", "finetune", "inspect_model", "plan"]


def convert(
    options: ConvertOptions, progress: Progress | None = None, *, finetune: FinetuneHook | None = None
) -> Report:
    """Convert a trained network into a bundle.

    Stages whose inputs have not changed since an earlier run into the same folder are not repeated.

    Args:
        options: What to convert and how.
        progress: Told what is going on.
        finetune: The user's own training after the transfer, instead of `options.finetune_hook`.

    Returns:
        The report; `report.is_success` says whether every promise holds. The bundle is written either way.

    Raises:
        SepdeployError: if the conversion cannot be carried out.
    """
    progress = progress or Silent()
    require_own_training(options.training, options.train, is_hooked=finetune is not None)
    if options.plan is not None:
        read_plan_file(options.plan)  # whether it can be read at all, before anything takes long
    elif not options.selects:
        find_scheme(options.scheme)
    folder = options.output_folder
    require_usable(folder)  # before the minutes that large sets of images take
    find_target(options.target, options.precision, options.threads).key()  # asks a board whether it answers
    if launched_processes() > 1 and (options.train or options.finetune_hook or finetune):
        raise UsageError(
            "convert runs in one process: convert without training first, then give the bundle to "
            "'accelerate launch -m sepdeploy finetune BUNDLE --train PATH'"
        )
    torch.manual_seed(options.seed)
    with given_hook(finetune, options.finetune_hook) as hook:
        inputs = load_inputs(options, progress)
        with locked(folder):
            store = StageStore(folder, on_change=lambda: discard_results(folder, RECORD))
            progress.stage("tracing the network")
            return _convert(store, options, inputs, hook, progress)


def _convert(
    store: StageStore,
    options: ConvertOptions,
    inputs: Inputs,
    hook: Hook | None,
    progress: Progress,
) -> Report:
    traced = trace(store, options, inputs)
    evaluator = _evaluator(inputs, batch_size_for(traced), progress)
    require_training(options, inputs, progress)
    # Before anything takes long: a network that cannot be exported is refused here.
    originals = deploy(store, options, inputs, traced, inputs.network, Role.ORIGINAL, inputs.model_sha256, progress)
    planned = _planner(store, options, inputs, traced, evaluator, originals, progress)
    is_trained = inputs.train is not None or hook is not None
    weighed = sha256_of_file(store.work / "selection.json") if options.selects else None
    basis = {**inputs.network_key(), **limit_options(options, inputs, hook), "weighed": weighed}
    is_known = hook is None or hook.key is not None  # two closures of one name may do different things
    attempts = Attempts(store, basis, first_attempt(options, is_trained=is_trained), resumes=is_known)
    is_limited = options.selects and options.selection.has_limit
    promise = None if is_limited else options.max_drop_points

    def tried(attempt: Attempt) -> _Tried | LooserOutcome:
        """What an attempt comes to; why its plan is not worth the recovery."""
        plan, network, guard = planned(attempt.limit_points)
        obstacle = attempts.obstacle(tried_plan(options, plan, guard, traced))
        if obstacle is not None:
            return obstacle
        recovery = Recovery(store, store.folder, options, inputs, traced, plan, progress, Processes())
        untrained = recover_without_labels(
            recovery, options, Recovered(TRANSFERRED, network), is_recovering=attempt.is_recovering
        )
        last = untrained
        if attempt.is_recovering:
            is_aware = options.training.is_quantization_aware
            last = train_network(recovery, inputs, untrained, hook, is_quantization_aware=is_aware)
        recovery.finish(last)
        drops = None
        if promise is not None and plan.replaced and not attempt.is_last:
            drops = measure_drops(store, options, inputs, traced, plan, last, originals, evaluator, progress)
        return _Tried(plan, guard, untrained, last, drops)

    # A hook's training is not repeated for more, and a given scheme has nothing that it makes small.
    may_loosen = hook is None and options.selects
    found = _settled(attempts, tried, promise, may_loosen=may_loosen, progress=progress)
    attempts.finish()
    looser = attempts.present.looser
    record = RunRecord(absolute_options(options, inputs.architecture), found.untrained.name, looser_plan=looser)
    return finish_bundle(
        store, options, inputs, traced, found.plan, found.guard, found.last, evaluator, record, progress
    )


@dataclass(frozen=True, slots=True)
class _Tried:
    """What an attempt came to.

    Attributes:
        plan: What it replaces.
        guard: How that was found.
        untrained: Its network before training.
        last: And after.
        drops: What it loses; None where that decides nothing.
    """

    plan: Plan
    guard: GuardRecord
    untrained: Recovered
    last: Recovered
    drops: Drops | None


def _settled(
    attempts: Attempts,
    tried: Callable[[Attempt], _Tried | LooserOutcome],
    promise: float | None,
    *,
    may_loosen: bool,
    progress: Progress,
) -> _Tried:
    """What the attempts end with, one after the other."""
    while True:
        attempt = attempts.present
        try:
            found = tried(attempt)
        except Exception as error:
            is_ours = isinstance(error, SepdeployError) and not isinstance(error, ContractError)
            if attempt.held is None or not (is_ours or is_passing(error)):
                raise
            why = str(error) if is_ours else error_summary(error)
            progress.stage(f"a cheaper plan failed ({why}): going back")
            attempts.go_back(LooserOutcome.FAILED, error=why)
            continue
        if isinstance(found, LooserOutcome):
            attempts.go_back(found)
            continue
        if promise is None or attempt.is_last:
            return found
        if found.drops is None:
            goes_on = attempts.after_nothing(promise, found.guard)
        elif found.drops.file > promise:
            goes_on = attempts.after_failure(promise, found.guard, found.drops)
        else:
            goes_on = may_loosen and attempts.after_success(promise, found.guard, found.drops)
        if not goes_on:
            return found


def _planner(
    store: StageStore,
    options: ConvertOptions,
    inputs: Inputs,
    traced: Trace,
    evaluator: Evaluator,
    originals: Sequence[ArtifactResult],
    progress: Progress,
    processes: Processes | None = None,
) -> Callable[[float | None], tuple[Plan, nn.Module, GuardRecord]]:
    """From a limit in points to the plan that holds it, its network before recovery, and how that was found."""
    if not options.selects:
        given = None if options.plan is None else read_given_plan(options.plan, traced, inputs.model_sha256)
        proposal = propose(store, options, inputs, traced, given)
        return lambda limit: run_guard(
            store, options, inputs, traced, proposal, evaluator, batch_size_for(traced), limit, progress
        )
    original = target_result(originals, options, Role.ORIGINAL)

    def original_cost() -> float:
        progress.stage("selection: measuring the original network")
        return target_cost([original], options).cost

    weighed = weigh(store, options, inputs, traced, original_cost, processes or Processes(), progress)

    def timed(plan: Plan, network: nn.Module) -> Measured:
        """The target's file of a network that was only transferred, against the original's: weights are no matter."""
        only_target = _for_timing(options)
        sha256 = sha256_of_bytes(to_json(plan).encode())
        results = deploy(store, only_target, inputs, traced, network, Role.CONVERTED, sha256, progress, plan)
        return target_cost([original, target_result(results, options, Role.CONVERTED)], options)

    return lambda limit: run_selection(store, options, inputs, traced, weighed, evaluator, limit, timed, progress)


def plan(
    options: ConvertOptions,
    folder: Path,
    *,
    front_points: int = 0,
    progress: Progress | None = None,
) -> tuple[Selection, tuple[FrontPoint, ...]]:
    """Weigh every form of every layer on the target and choose, as `convert` with scheme 'auto' does, and stop there.

    Writes `plan.json`, to be edited or given to `convert`, and into the folder `search` what a repeated call goes on
    from. Called alike by all processes of an `accelerate launch`, they share the measurement of the damages.

    Args:
        options: As for `convert`, with scheme 'auto'.
        folder: Where the plan goes.
        front_points: How many plans between the original and the cheapest to carry out and measure besides.
        progress: Told what is going on.

    Returns:
        What was weighed with what was chosen, and those plans, the original first.

    Raises:
        SepdeployError: if the network cannot be converted.
    """
    if not options.selects:
        raise UsageError("a plan is chosen by --scheme auto; 'sepdeploy convert' takes a scheme or a plan as it is")
    if any(folder.glob("*")) and not (folder / "search").is_dir():
        raise UsageError(f"{folder} holds other files; choose another --output or empty it first")
    find_target(options.target, options.precision, options.threads).key()  # asks a board whether it answers
    torch.manual_seed(options.seed)
    with joined_processes() as processes:
        planned = None
        if processes.is_first:
            planned = _plan(options, folder, front_points, processes, progress or Silent())
        else:
            processes.told(None)  # that all is fine: if anything is wrong, the first process alone says so
            inputs = load_inputs(options, Silent())
            traced = trace_network(inputs.network, inputs.example(), includes_linear=options.includes_linear)
            prefer_channels_last(inputs.network, inputs.example())
            share_damages(options, inputs, traced, processes)
        said: tuple[Selection, tuple[FrontPoint, ...]] = processes.told(planned)
        return said


def _plan(
    options: ConvertOptions, folder: Path, front_points: int, processes: Processes, progress: Progress
) -> tuple[Selection, tuple[FrontPoint, ...]]:
    inputs = load_inputs(options, progress)
    with locked(folder / "search"):
        store = StageStore(folder / "search", on_change=lambda: None)
        traced = trace(store, options, inputs)
        evaluator = _evaluator(inputs, batch_size_for(traced), progress)
        only_target = _for_timing(options)
        originals = deploy(
            store, only_target, inputs, traced, inputs.network, Role.ORIGINAL, inputs.model_sha256, progress
        )
        processes.told("all is fine")
        is_trained = inputs.train is not None or options.finetune_hook is not None
        limit = first_attempt(options, is_trained=is_trained).limit_points
        planned = _planner(store, only_target, inputs, traced, evaluator, originals, progress, processes)
        chosen, _, record = planned(limit)
        weighed = with_plan(read_json(Selection, store.work / "selection.json"), chosen)
        if record.selection is not None:
            weighed = replace(weighed, notes=record.selection.notes)
        write_json(folder / "plan.json", weighed)
        front = measure_front(options, inputs, traced, weighed, evaluator, front_points, progress)
    return weighed, front


def _for_timing(options: ConvertOptions) -> ConvertOptions:
    """For files whose weights do not matter: the target's alone, quantized the quickest way."""
    return replace(
        options,
        formats=(target_format(options.target),),
        precisions=tuple(dict.fromkeys((Precision.FLOAT32, options.precision))),
        int8=replace(PLAIN, io=options.int8.io),
        training=replace(options.training, is_quantization_aware=False),  # it asks for int8 files
    )


def _evaluator(inputs: Inputs, batch_size: int, progress: Progress) -> Evaluator:
    """What compares networks with the original, which is seen to be usable first."""
    prefer_channels_last(inputs.network, inputs.example())
    evaluator = Evaluator(inputs.network, inputs.validation, batch_size, progress.step)
    progress.stage("running the original network on the validation images")
    evaluator.original_quality()
    return evaluator


def finetune(
    bundle: str | Path,
    train: str | None = None,
    *,
    training: TrainOptions | None = None,
    finetune: FinetuneHook | str | None = None,
    moved: MovedInputs | None = None,
    command: str = "",
    progress: Progress | None = None,
) -> Report:
    """Train the network of a finished bundle, and export, measure and report it again.

    Training starts from what `convert` made before any training, or from the weights that `adopt` brought; what is
    replaced stays as it is. Repeated with the same images and options, it goes on where it was stopped. Called alike by
    all processes of an `accelerate launch`, it trains with all of them; the first does the rest.

    Args:
        bundle: The output folder of `sepdeploy convert`.
        train: Images, with or without labels.
        training: How to fine-tune on them.
        finetune: The user's own training in place of the fine-tuning, a callable or 'file.py:function'.
        moved: Where the inputs of the conversion are now.
        command: The command line, for the record.
        progress: Told what is going on.

    Returns:
        The report, as of `convert`.

    Raises:
        SepdeployError: if the bundle cannot be continued.
    """
    if train is None and finetune is None:
        raise UsageError("there is nothing to train: give images (--train) or a hook (--finetune-hook)")
    training = training or TrainOptions()
    require_own_training(training, train, is_hooked=finetune is not None)
    spec, function = (finetune, None) if isinstance(finetune, str) else (None, finetune)
    with joined_processes() as processes:
        if not processes.is_first:
            processes.told(None)  # that all is fine: if anything is wrong, the first process alone says so
        with given_hook(function, spec) as hook:
            record = open_record(Path(bundle), moved or MovedInputs())
            record = with_training(record, train, training, spec)
            report = None
            if processes.is_first:
                report = _continue(record, hook, None, processes, command, progress or Silent())
            else:
                _take_part(record, hook, processes)
            said: Report = processes.told(report)
            return said


def adopt(
    bundle: str | Path,
    model: nn.Module | Mapping[str, Tensor] | str | Path,
    *,
    moved: MovedInputs | None = None,
    progress: Progress | None = None,
) -> Report:
    """Bring weights back that were trained elsewhere; export, measure and report the bundle's network with them.

    They take the place of what the bundle was trained to before; a later `finetune` starts from them. The same
    `convert` run again goes back to the bundle without them.

    Args:
        bundle: The output folder of `sepdeploy convert`.
        model: What `sepdeploy.load` gave, trained; or its state dict; or a file with that (.pt, .safetensors, training
            checkpoints, of Lightning too). Prefixes such as `module.` and `model.` are looked through.
        moved: Where the inputs of the conversion are now.
        progress: Told what is going on.

    Returns:
        The report, as of `convert`.

    Raises:
        SepdeployError: if the bundle cannot be continued or the weights are not those of its network.
    """
    record = with_training(open_record(Path(bundle), moved or MovedInputs()), None, TrainOptions(), None)
    if isinstance(model, str | Path):
        weights = Weights(load_state_dict(Path(model)).tensors, str(model))
    else:
        weights = Weights(model, f"the given {type(model).__name__}")
    command = f"sepdeploy.adopt({str(bundle)!r}, ...)  # {weights.source}"
    return _continue(replace(record, is_adopted=True), None, weights, Processes(), command, progress or Silent())


def _continue(
    record: RunRecord,
    hook: Hook | None,
    adopted: Weights | None,
    processes: Processes,
    command: str,
    progress: Progress,
) -> Report:
    """Go on with a finished bundle in the process that writes it."""
    options = record.options
    folder = options.output_folder
    find_target(options.target, options.precision, options.threads).key()  # before training, which takes long
    torch.manual_seed(options.seed)
    inputs = load_inputs(options, progress)
    with locked(folder):
        store = StageStore(folder, on_change=lambda: discard_results(folder))
        require_unchanged(store, options, inputs)
        require_training(options, inputs, progress)
        traced, plan, guard = read_conversion(store)
        if not plan.replaced:
            raise UsageError(f"{folder} is the original network: nothing was replaced, so there is nothing to train")
        recovery = Recovery(store, folder, options, inputs, traced, plan, progress, processes)
        start = recovery.reopen(record.untrained if adopted is not None else record.start)
        processes.told("all is fine")
        evaluator = _evaluator(inputs, batch_size_for(traced), progress)
        if adopted is not None:
            start = recovery.adopt(start, adopted)
        is_aware = options.training.is_quantization_aware
        last = train_network(recovery, inputs, start, hook, is_quantization_aware=is_aware)
        recovery.finish(last)
        told = replace(options, command=f"{options.command or repr(options)} && {command}")
        kept = replace(record, options=absolute_options(options, inputs.architecture))
        return finish_bundle(store, told, inputs, traced, plan, guard, last, evaluator, kept, progress)


def _take_part(record: RunRecord, hook: Hook | None, processes: Processes) -> None:
    """Train along with the first process, which does everything else."""
    options = record.options
    inputs = load_inputs(options, Silent())
    traced, plan = read_plan(options.output_folder)
    recovery = Recovery(None, options.output_folder, options, inputs, traced, plan, Silent(), processes)
    # Opened before the memory layout changes, as in the first process: training needs the same layout in all.
    start = recovery.open(record.start)
    prefer_channels_last(inputs.network, inputs.example())
    train_network(recovery, inputs, start, hook, is_quantization_aware=options.training.is_quantization_aware)


def design(options: DesignOptions, progress: Progress | None = None) -> tuple[nn.Module, DesignResult]:
    """Build a separable variant of an architecture, with fresh weights, at the cost of the original.

    Args:
        options: What to build; with an output folder the variant is also written there, for `sepdeploy.load`.
        progress: Told what is going on.

    Returns:
        The network, to be trained, and its cost beside the original's.

    Raises:
        SepdeployError: if the variant cannot be built.
    """
    find_scheme(options.scheme)
    if options.output is not None:
        check_design_folder(options.output)
    designed = design_network(options, progress)
    if options.output is not None:
        write_design(options.output, designed, options)
    return designed.module, designed.result
