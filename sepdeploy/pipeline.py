"""A conversion from the checkpoint to the report: the stages in their order."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from sepdeploy.analyze.liveness import measure_memory
from sepdeploy.analyze.trace import trace_network
from sepdeploy.core.artifact import Format, Precision, Role
from sepdeploy.core.conv import Trace
from sepdeploy.core.design import DesignOptions, DesignResult
from sepdeploy.core.files import sha256_of_file, write_text
from sepdeploy.core.inspection import Inspection
from sepdeploy.core.options import ConvertOptions
from sepdeploy.core.plan import Candidate, Plan, SchemeOptions
from sepdeploy.core.progress import Progress, Silent
from sepdeploy.core.report import ArtifactResult, Report
from sepdeploy.core.stage_store import StageStore, locked, require_usable
from sepdeploy.errors import UsageError
from sepdeploy.loading.model import load_model
from sepdeploy.planning.candidates import find_candidate
from sepdeploy.planning.design_network import design_network
from sepdeploy.planning.evaluate import Evaluator, batch_size_for, prefer_channels_last
from sepdeploy.planning.memory import memory_with_candidates
from sepdeploy.schemes.scheme import find_scheme
from sepdeploy.stages.deploy import artifact_path, deploy, measure_latency, measure_quality, versions
from sepdeploy.stages.design import check_design_folder, write_design
from sepdeploy.stages.guard import GuardRecord, propose, run_guard, trace
from sepdeploy.stages.load import Inputs, load_inputs
from sepdeploy.stages.report import make_report, target_result, write_bundle

__all__ = ["convert", "design", "inspect_model"]

_MAX_TIGHTENINGS = 2
"""How often the guard runs again with a tighter limit because the target's file loses more than the network."""


def convert(options: ConvertOptions, progress: Progress | None = None) -> Report:
    """Convert a trained network into a bundle.

    Stages whose inputs have not changed since an earlier run into the same folder are not repeated.

    Args:
        options: What to convert and how.
        progress: Told what is going on.

    Returns:
        The report; `report.is_success` says whether every promise holds. The bundle is written either way.

    Raises:
        SepdeployError: if the conversion cannot be carried out.
    """
    progress = progress or Silent()
    find_scheme(options.scheme)
    folder = options.output_folder
    require_usable(folder)  # before the minutes that large sets of images take
    torch.manual_seed(options.seed)
    inputs = load_inputs(options, progress)
    with locked(folder):
        store = StageStore(folder, on_change=lambda: _discard_results(folder))
        progress.stage("tracing the network")
        traced = trace(store, options, inputs)
        proposal = propose(store, options, inputs, traced)
        return _convert(store, options, inputs, traced, proposal, progress)


def _convert(
    store: StageStore, options: ConvertOptions, inputs: Inputs, traced: Trace, proposal: Plan, progress: Progress
) -> Report:
    batch_size = batch_size_for(traced)
    prefer_channels_last(inputs.network, inputs.example())
    evaluator = Evaluator(inputs.network, inputs.validation, batch_size, progress.step)
    progress.stage("running the original network on the validation images")
    original_quality = evaluator.original_quality()
    originals = deploy(store, options, inputs, traced, inputs.network, Role.ORIGINAL, inputs.model_sha256, progress)
    limit_path = store.work / "limit.json"
    limit_key = {**inputs.network_key(), **_guard_options(options, inputs)}
    is_settled = store.is_current("limit", limit_key, (limit_path,))
    limit = json.loads(limit_path.read_bytes()) if is_settled else options.max_drop_points
    attempts = 1 if is_settled else 1 + _MAX_TIGHTENINGS
    for attempt in range(1, attempts + 1):
        plan, network, guard = run_guard(
            store, options, inputs, traced, proposal, evaluator, batch_size, limit, progress
        )
        converted = _deploy_converted(store, options, inputs, traced, network, evaluator, progress)
        tighter = _tighter_limit(options, converted, guard)
        if tighter is None or not plan.replaced or attempt == attempts:
            break
        limit = tighter
    store.run("limit", limit_key, (limit_path,), lambda: write_text(limit_path, json.dumps(limit)))
    results = [measure_quality(store, r, inputs, evaluator, options, progress) for r in (*originals, *converted)]
    results = measure_latency(results, options, progress)
    progress.stage("writing the report")
    report = make_report(options, inputs, traced, plan, network, guard, original_quality, results)
    _discard_results(store.folder)
    _discard_other_formats(store.folder, options.formats)
    write_bundle(options, inputs, report)
    return report


def _guard_options(options: ConvertOptions, inputs: Inputs) -> dict[str, object]:
    """What the limit that the guard ends up with depends on, besides the network."""
    return {
        "scheme": options.scheme,
        "options": repr(options.scheme_options),
        "includes_linear": options.includes_linear,
        "transfer": options.transfer,
        "max_drop": options.max_drop_points,
        "target": options.target,
        "precision": options.precision.value,
        "calibration": inputs.calibration.sha256,
        "validation": inputs.validation.sha256,
        "versions": versions(),
    }


def _deploy_converted(
    store: StageStore,
    options: ConvertOptions,
    inputs: Inputs,
    traced: Trace,
    network: nn.Module,
    evaluator: Evaluator,
    progress: Progress,
) -> list[ArtifactResult]:
    """The converted network's files, the target's with its quality."""
    weights = sha256_of_file(store.folder / "model.pt") + sha256_of_file(store.folder / "plan.json")
    results = deploy(store, options, inputs, traced, network, Role.CONVERTED, weights, progress)
    target = target_result(results, options, Role.CONVERTED)
    measured = measure_quality(store, target, inputs, evaluator, options, progress)
    return [measured if result is target else result for result in results]


def _tighter_limit(options: ConvertOptions, converted: list[ArtifactResult], guard: GuardRecord) -> float | None:
    """The limit for the PyTorch network that should bring the target's file below --max-drop; None if it is there.

    Quantization takes its own share of the drop, which the guard's PyTorch network does not see.
    """
    quality = target_result(converted, options, Role.CONVERTED).quality
    if options.max_drop_points is None or quality is None or quality.drop_points <= options.max_drop_points:
        return None
    return max(0.0, guard.quality.drop_points - (quality.drop_points - options.max_drop_points))


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


def inspect_model(
    model: Path,
    arch: str,
    input_shape: tuple[int, int, int],
    schemes: Sequence[str],
    options: SchemeOptions,
    *,
    includes_linear: bool = False,
) -> Inspection:
    """What a network consists of, what each convolution could become, and how much memory that takes.

    Args:
        model: The checkpoint.
        arch: The architecture.
        input_shape: (C, H, W).
        schemes: Names of the schemes to try.
        options: Hyper-parameters of the schemes.
        includes_linear: Whether to list linear layers too, as 1x1 convolutions.

    Raises:
        SepdeployError: if the network cannot be loaded or traced.
    """
    if min(input_shape) < 1:
        raise UsageError(f"--input-shape must be positive, got {','.join(map(str, input_shape))}")
    loaded = load_model(model, arch)
    example = torch.zeros(1, *input_shape)
    traced = trace_network(loaded.module, example, includes_linear=includes_linear)
    found = [find_scheme(name) for name in schemes]
    candidates = {
        site.name: {scheme.name: find_candidate(site, scheme, options) for scheme in found} for site in traced.sites
    }
    memory_with, notes = {}, list(loaded.notes)
    for scheme in found:
        offers = {name: of_site[scheme.name] for name, of_site in candidates.items()}
        chosen = {name: offer for name, offer in offers.items() if isinstance(offer, Candidate)}
        if not chosen:
            continue
        try:
            memory_with[scheme.name] = memory_with_candidates(loaded.module, traced, chosen, example)
        except UsageError as error:
            notes.append(f"no memory is given for {scheme.name}: {error}")
    return Inspection(traced, candidates, measure_memory(loaded.module, example), memory_with, tuple(notes))


def _discard_results(folder: Path) -> None:
    """Remove what marks the bundle as finished, before the first file behind it changes; the manifest goes first."""
    for name in ("manifest.json", "report.json", "report.html"):
        (folder / name).unlink(missing_ok=True)


def _discard_other_formats(folder: Path, formats: tuple[Format, ...]) -> None:
    """Remove files of formats that an earlier run made and this one does not."""
    for file_format in Format:
        if file_format not in formats:
            for role in Role:
                for precision in Precision:
                    artifact_path(folder, file_format, precision, role).unlink(missing_ok=True)
