"""Accuracy and cost of the files of a bundle, and of its network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from torch import nn

from sepdeploy.bench.accuracy import QualityMeter
from sepdeploy.bench.environment import cpu_name
from sepdeploy.bench.session import open_session
from sepdeploy.core.artifact import Role
from sepdeploy.core.codec import read_json, write_json
from sepdeploy.core.files import sha256_of_file
from sepdeploy.core.measurement import Counts, Measured, Method, Quality
from sepdeploy.core.options import ConvertOptions, target_for, target_format
from sepdeploy.core.progress import Progress
from sepdeploy.core.report import ArtifactResult
from sepdeploy.core.stage_store import StageStore
from sepdeploy.errors import ToolError
from sepdeploy.planning.evaluate import Evaluator
from sepdeploy.planning.target import find_kind, find_target
from sepdeploy.stages.load import Inputs
from sepdeploy.stages.versions import versions

__all__ = ["measure_cost", "measure_network", "measure_quality", "target_cost"]

_OTHER_IMAGES = 2000
"""Validation images for files that no promise is about."""


def measure_quality(
    store: StageStore,
    result: ArtifactResult,
    inputs: Inputs,
    evaluator: Evaluator,
    options: ConvertOptions,
    progress: Progress,
) -> ArtifactResult:
    """Run the file on the validation images; work/quality/*.json.

    The target's files run on all of them, the others on 2,000 at most: their numbers say how many.
    """
    artifact = result.artifact
    name = f"{artifact.role.value}.{artifact.precision.value}.{artifact.format.value}"
    path = store.work / "quality" / f"{name}.json"

    def make() -> None:
        progress.stage(f"running the {artifact.role.value} {artifact.precision.value} {artifact.format.value} file")
        session = open_session(Path(artifact.path), threads=options.threads, is_channels_last=artifact.is_channels_last)
        meter = QualityMeter()
        done = 0
        for batch, reference, labels in evaluator.reference_batches():
            meter.update(reference, session.predict(batch), labels)
            done += len(batch)
            progress.step(done, wanted)
            if done >= wanted:
                break
        write_json(path, meter.result(None))

    is_target = options.is_target_file(artifact.format, artifact.precision)
    wanted = len(inputs.validation) if is_target else min(len(inputs.validation), _OTHER_IMAGES)
    key = {
        **inputs.network_key(),
        "file": artifact.sha256,
        "images": inputs.validation.sha256,
        "wanted": wanted,
        "versions": versions(),
        "cpu": cpu_name(),
        "threads": options.threads,
    }
    store.run(f"quality {name}", key, (path,), make)
    return replace(result, quality=read_json(Quality, path))


def measure_network(
    store: StageStore, network: nn.Module, inputs: Inputs, evaluator: Evaluator, progress: Progress
) -> Quality:
    """Run the bundle's PyTorch network on all validation images; work/quality/network.json."""
    path = store.work / "quality" / "network.json"

    def make() -> None:
        progress.stage("running the converted network on the validation images")
        write_json(path, evaluator.quality(network)[0])

    key = {
        **inputs.network_key(),
        "weights": sha256_of_file(store.folder / "model.pt"),
        "plan": sha256_of_file(store.folder / "plan.json"),
        "images": inputs.validation.sha256,
    }
    store.run("quality network", key, (path,), make)
    return read_json(Quality, path)


def target_cost(results: Sequence[ArtifactResult], options: ConvertOptions) -> Measured:
    """What the last of some files costs on the target; against the first, in the same rounds, if there are several."""
    target = find_target(options.target, options.precision, options.threads)
    files = [result.artifact for result in results]
    return target.compare(files, seconds=options.bench_seconds, seed=options.seed)[-1]


def measure_cost(results: list[ArtifactResult], options: ConvertOptions, progress: Progress) -> list[ArtifactResult]:
    """Time or count every file on the target's processor, each converted one beside the original of its kind.

    Files of the target's other format stay unmeasured where the target cannot run them.

    Raises:
        ToolError: if the files of the target's format cannot be measured.
    """
    measured = []
    for file_format in options.formats:
        for precision in options.precisions:
            pair = [r for r in results if (r.artifact.format, r.artifact.precision) == (file_format, precision)]
            kind = find_kind(target_for(options.target, file_format))
            verb = "timing" if kind.method is Method.WALL_CLOCK else f"{kind.name}: counting"
            progress.stage(f"{verb} {file_format.value} {precision.value}, {options.threads} threads")
            pair.sort(key=lambda r: r.artifact.role is not Role.ORIGINAL)  # the first is the reference
            # Without asking for all that pricing needs: files of the other format run without it.
            target = kind.make(precision, options.threads)
            try:
                found = target.compare([r.artifact for r in pair], seconds=options.bench_seconds, seed=options.seed)
            except ToolError as error:
                if file_format is target_format(options.target):
                    raise
                # Hours of work are not lost because a board has no runtime for the other format.
                progress.stage(f"{file_format.value} {precision.value} files stay unmeasured: {error}")
                measured += pair
                continue
            measured += [_with_measured(r, each) for r, each in zip(pair, found, strict=True)]
    return measured


def _with_measured(result: ArtifactResult, measured: Measured) -> ArtifactResult:
    if isinstance(measured, Counts):
        return replace(result, counts=measured)
    return replace(result, latency=measured)
