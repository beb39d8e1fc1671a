"""From a converted network to the finished bundle: files, measurements, report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from sepdeploy.core.artifact import Format, Precision, Role
from sepdeploy.core.conv import Trace
from sepdeploy.core.files import sha256_of_file
from sepdeploy.core.manifest import RunRecord
from sepdeploy.core.options import ConvertOptions, target_format
from sepdeploy.core.plan import Plan
from sepdeploy.core.progress import Progress
from sepdeploy.core.report import ArtifactResult, Drops, Report
from sepdeploy.core.stage_store import StageStore
from sepdeploy.errors import ContractError
from sepdeploy.planning.evaluate import Evaluator
from sepdeploy.stages.core_numerics import compare_on_core
from sepdeploy.stages.deploy import artifact_path, deploy
from sepdeploy.stages.guard import GuardRecord
from sepdeploy.stages.load import Inputs
from sepdeploy.stages.measure import measure_cost, measure_network, measure_quality
from sepdeploy.stages.mixed import Mixer, read_mixed
from sepdeploy.stages.recover import Recovered
from sepdeploy.stages.report import Qualities, make_report, target_result, write_bundle

__all__ = ["discard_results", "finish_bundle", "measure_drops"]


def finish_bundle(
    store: StageStore,
    options: ConvertOptions,
    inputs: Inputs,
    traced: Trace,
    plan: Plan,
    guard: GuardRecord,
    last: Recovered,
    evaluator: Evaluator,
    record: RunRecord,
    progress: Progress,
) -> Report:
    """Export, measure and report the bundle's network."""
    files = partial(deploy, store, options, inputs, traced, is_final=True)
    originals = files(inputs.network, Role.ORIGINAL, inputs.model_sha256, progress)
    mixer = _mixer(store, options, inputs, plan, evaluator, progress)
    weights = _weights_sha256(store)
    converted = files(last.network, Role.CONVERTED, weights, progress, plan, last.ranges, mixer=mixer)
    qualities = Qualities(
        original=evaluator.original_quality(),
        transferred=guard.quality,
        converted=measure_network(store, last.network, inputs, evaluator, progress),
    )
    results = [measure_quality(store, r, inputs, evaluator, options, progress) for r in (*originals, *converted)]
    results = compare_on_core(store, results, options, progress)
    results = measure_cost(results, options, progress)
    progress.stage("writing the report")
    mixed = None if mixer is None else read_mixed(store)
    report = make_report(
        options,
        inputs,
        traced,
        plan,
        last.network,
        guard,
        last.steps,
        qualities,
        results,
        mixed,
        record.looser_plan,
    )
    discard_results(store.folder)
    _discard_other_files(store.folder, options)
    write_bundle(options, inputs, report, record)
    return report


def measure_drops(
    store: StageStore,
    options: ConvertOptions,
    inputs: Inputs,
    traced: Trace,
    plan: Plan,
    last: Recovered,
    originals: Sequence[ArtifactResult],
    evaluator: Evaluator,
    progress: Progress,
) -> Drops:
    """Points that the target's file loses, which is exported and measured for that, and where they go."""
    only_target = replace(options, formats=(target_format(options.target),))
    weights = _weights_sha256(store)
    mixer = _mixer(store, options, inputs, plan, evaluator, progress)
    made = partial(deploy, store, only_target, inputs, traced, mixer=mixer)
    results = made(last.network, Role.CONVERTED, weights, progress, plan, last.ranges)
    points = []
    for role in (Role.CONVERTED, Role.ORIGINAL):
        target = target_result((*results, *originals), options, role)
        quality = measure_quality(store, target, inputs, evaluator, options, progress).quality
        if quality is None:
            raise ContractError("the target's file was not measured")
        points.append(quality.drop_points)
    return Drops(points[0], measure_network(store, last.network, inputs, evaluator, progress).drop_points, points[1])


def _mixer(
    store: StageStore, options: ConvertOptions, inputs: Inputs, plan: Plan, evaluator: Evaluator, progress: Progress
) -> Mixer | None:
    return Mixer(store, options, inputs, plan, evaluator, progress) if options.mixed == "auto" else None


def _weights_sha256(store: StageStore) -> str:
    """What the converted network's files depend on."""
    return sha256_of_file(store.folder / "model.pt") + sha256_of_file(store.folder / "plan.json")


def discard_results(folder: Path, *more: str) -> None:
    """Remove what marks the bundle as finished, before the first file behind it changes; the manifest goes first."""
    for name in ("manifest.json", "report.json", "report.html", *more):
        (folder / name).unlink(missing_ok=True)


def _discard_other_files(folder: Path, options: ConvertOptions) -> None:
    """Remove files of formats and precisions that an earlier run made and this one does not."""
    for file_format in Format:
        for precision in Precision:
            if file_format not in options.formats or precision not in options.precisions:
                for role in Role:
                    artifact_path(folder, file_format, precision, role).unlink(missing_ok=True)
