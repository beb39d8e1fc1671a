"""Last stage: checks, report and manifest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from sepdeploy.analyze.liveness import measure_memory
from sepdeploy.core.artifact import Format, Precision, Role
from sepdeploy.core.codec import write_json
from sepdeploy.core.conv import Trace
from sepdeploy.core.files import sha256_of_file, write_text
from sepdeploy.core.looser_plan import LooserPlan
from sepdeploy.core.manifest import FileEntry, Manifest, RunRecord
from sepdeploy.core.measurement import Counts, Quality
from sepdeploy.core.memory import BYTES_PER_VALUE, MemoryProfile
from sepdeploy.core.mixed import MixedPlan
from sepdeploy.core.options import ConvertOptions
from sepdeploy.core.plan import Plan
from sepdeploy.core.receptive_field import receptive_field
from sepdeploy.core.report import ArtifactResult, Check, Drops, NetworkCost, Report
from sepdeploy.core.training import RecoveryStep
from sepdeploy.errors import ContractError
from sepdeploy.passes.lower_chains import try_lowerings
from sepdeploy.quantize.float16 import computes_in_float16
from sepdeploy.quantize.saturation import saturates_u8s8
from sepdeploy.render.format_numbers import plural
from sepdeploy.render.html import render_html
from sepdeploy.stages.core_numerics import numerics_check, numerics_notes
from sepdeploy.stages.fault import find_faults
from sepdeploy.stages.guard import GuardRecord
from sepdeploy.stages.load import Inputs, summarize_images
from sepdeploy.stages.looser_plan import looser_notes
from sepdeploy.stages.mixed import mixed_notes
from sepdeploy.stages.reopen import RECORD
from sepdeploy.stages.versions import versions
from sepdeploy.version import __version__

__all__ = ["Qualities", "make_report", "target_result", "write_bundle"]

_CHANCE_FACTOR = 2.0

_FAULTS = {
    "transfer": "the transfer (the float network against the original)",
    "quantization": "quantization (the int8 file against its float network)",
}


@dataclass(frozen=True, slots=True)
class Qualities:
    """Of PyTorch networks on all validation images.

    Attributes:
        original: Of the trained network.
        transferred: Of the converted network before recovery.
        converted: Of the one that is exported.
    """

    original: Quality
    transferred: Quality
    converted: Quality


def target_result(results: Sequence[ArtifactResult], options: ConvertOptions, role: Role) -> ArtifactResult:
    """The file of `role` that the promises are about."""
    for result in results:
        artifact = result.artifact
        if artifact.role is role and options.is_target_file(artifact.format, artifact.precision):
            return result
    raise ContractError(f"no {role.value} file was made for {options.target} {options.precision.value}")


def make_report(
    options: ConvertOptions,
    inputs: Inputs,
    traced: Trace,
    plan: Plan,
    network: nn.Module,
    guard: GuardRecord,
    recovery: Sequence[RecoveryStep],
    qualities: Qualities,
    results: Sequence[ArtifactResult],
    mixed: MixedPlan | None = None,
    looser_plan: LooserPlan | None = None,
) -> Report:
    """Put everything that was measured together, with paths relative to the bundle."""
    folder = options.output_folder
    in_bundle = tuple(
        replace(r, artifact=replace(r.artifact, path=Path(r.artifact.path).relative_to(folder).as_posix()))
        for r in results
    )
    convs = len(traced.sites)
    memory_before, memory_after = (measure_memory(each, inputs.example()) for each in (inputs.network, network))
    return Report(
        version=__version__,
        model=str(options.model),
        arch=options.arch,
        command=options.command or repr(options),
        seed=options.seed,
        target=options.target,
        precision=options.precision,
        max_drop_points=options.max_drop_points,
        guard_limit_points=guard.limit_points,
        input_shape=traced.input_shape,
        calibration=summarize_images(inputs.calibration),
        validation=summarize_images(inputs.validation),
        original=NetworkCost(traced.total_macs, traced.total_params, convs),
        converted=NetworkCost(plan.macs_of(traced), sum(p.numel() for p in network.parameters()), convs),
        original_memory=memory_before.memory,
        converted_memory=memory_after.memory,
        plan=plan,
        transfer=guard.transfers,
        guard=guard.steps,
        recovery=tuple(recovery),
        original_quality=qualities.original,
        transferred_quality=qualities.transferred,
        converted_quality=qualities.converted,
        artifacts=in_bundle,
        checks=_checks(
            options,
            plan,
            in_bundle,
            qualities.converted,
            network,
            memory_after,
            len(inputs.calibration),
            is_hooked=options.finetune_hook is not None or any(step.name == "hook" for step in recovery),
        ),
        notes=(
            *inputs.notes,
            *_quality_notes(inputs, traced, qualities.original),
            *_recovery_notes(inputs, recovery),
            *_field_notes(traced, plan),
            *_memory_notes(options, plan, memory_before, memory_after),
            *_lowering_notes(options, network),
            *_file_notes(options, in_bundle),
            *numerics_notes(in_bundle, options),
            *_int8_notes(inputs, in_bundle, mixed),
            *_selection_notes(guard),
            *looser_notes(looser_plan),
            *(() if mixed is None else mixed_notes(mixed)),
        ),
        selection=guard.selection,
        mixed=mixed,
        looser_plan=looser_plan,
    )


def write_bundle(options: ConvertOptions, inputs: Inputs, report: Report, record: RunRecord) -> None:
    """Write options.json, report.json, report.html and, last, manifest.json."""
    folder = options.output_folder
    write_json(folder / RECORD, record)
    write_json(folder / "report.json", report)
    write_text(folder / "report.html", render_html(report))
    names = [
        "plan.json",
        "model.pt",
        *(r.artifact.path for r in report.artifacts),
        RECORD,
        "report.json",
        "report.html",
    ]
    manifest = Manifest(
        version=__version__,
        command=options.command or repr(options),
        seed=options.seed,
        model=str(options.model),
        model_sha256=inputs.model_sha256,
        arch=inputs.architecture,
        input_shape=report.input_shape,
        versions=versions(),
        files={n: FileEntry((folder / n).stat().st_size, sha256_of_file(folder / n)) for n in names},
    )
    write_json(folder / "manifest.json", manifest)


def _checks(
    options: ConvertOptions,
    plan: Plan,
    results: Sequence[ArtifactResult],
    quality_of_network: Quality,
    network: nn.Module,
    memory: MemoryProfile,
    images: int,
    *,
    is_hooked: bool = False,
) -> tuple[Check, ...]:
    converted = target_result(results, options, Role.CONVERTED)
    checks = []
    if options.max_drop_points is not None and converted.quality is not None:
        quality = converted.quality
        checks.append(_accuracy_check(options, results, quality, quality_of_network, images, is_hooked=is_hooked))
    checks += numerics_check(results, options)
    limits = tuple(_limit_checks(options, converted, network, memory)) if options.selects else ()
    if plan.replaced:
        # Where something else than speed was asked for, a slower file is worth a note (`_file_notes`), but no failure.
        promises_speed = not (options.selects and options.selection.takes_slower_forms)
    else:
        promises_speed = not limits or not all(check.is_met for check in limits)  # the original holds the limits itself
    if plan.scheme != "dense" and promises_speed:
        checks.append(_speed_check(options, plan, converted))
    return (*checks, *limits)


def _accuracy_check(
    options: ConvertOptions,
    results: Sequence[ArtifactResult],
    quality: Quality,
    quality_of_network: Quality,
    images: int,
    *,
    is_hooked: bool = False,
) -> Check:
    """Whether the target's file loses no more than --max-drop, and which stage is at fault if it does."""
    limit = options.max_drop_points
    if limit is None:
        raise ContractError("there is no limit to check")
    original = target_result(results, options, Role.ORIGINAL).quality
    drops = Drops(
        quality.drop_points, quality_of_network.drop_points, None if original is None else original.drop_points
    )
    sentence = (
        f"{drops.file:.2f} points of {quality.drop_basis} lost by the {options.target} {options.precision.value} file "
        f"on {quality.images} images, the limit is {limit:g}"
    )
    faults = find_faults(options, drops, images, is_hooked=is_hooked)
    for fault in faults:
        sentence += f"; {_FAULTS[fault.stage]} loses {fault.points:.2f}: try {', '.join(fault.advice)}"
    if faults:
        sentence += ", or a higher --max-drop"
    if any(fault.stage == "quantization" for fault in faults) and drops.original_file is not None:
        sentence += f" (the original network loses {drops.original_file:.2f} in {options.precision.value})"
    return Check("accuracy", drops.file <= limit, sentence, faults)


def _limit_checks(
    options: ConvertOptions, converted: ArtifactResult, network: nn.Module, memory: MemoryProfile
) -> Iterator[Check]:
    """Whether what was asked of the selection holds for what is handed over."""
    wanted, measured = options.selection, converted.measured
    where = f"{options.target} {options.precision.value}"
    is_time = not isinstance(measured, Counts)
    if wanted.max_latency is not None and measured is not None:
        unit, kind = ("ms", "median") if is_time else ("kcycles", "modelled, the low end")
        sentence = f"{measured.cost:.4g} {unit} for one inference on {where} ({kind}), the limit is"
        yield Check("latency", measured.cost <= wanted.max_latency, f"{sentence} {wanted.max_latency:g} {unit}")
    if wanted.max_latency_ratio is not None and measured is not None and measured.speedup is not None:
        ratio = 1 / measured.speedup
        what = "latency" if is_time else "modelled cycles"
        sentence = f"{100 * ratio:.3g}% of the original's {what} on {where}, the limit is"
        yield Check("latency", ratio <= wanted.max_latency_ratio, f"{sentence} {100 * wanted.max_latency_ratio:.3g}%")
    if wanted.max_size_bytes is not None:
        size = sum(p.numel() for p in network.parameters()) * BYTES_PER_VALUE[options.precision]
        sentence = (
            f"{size:,} bytes of weights in {options.precision.value} (the file has {converted.artifact.size_bytes:,}), "
            f"the limit is {wanted.max_size_bytes:,}"
        )
        yield Check("size", size <= wanted.max_size_bytes, sentence)
    if wanted.max_memory_bytes is not None:
        peak = memory.peak(options.precision)
        needed = peak.live_bytes(options.precision)
        sentence = (
            f"{needed:,} bytes of activations at the peak in {options.precision.value} ({peak.operator} in "
            f"{peak.module or 'the network itself'}), the limit is {wanted.max_memory_bytes:,}"
        )
        yield Check("memory", needed <= wanted.max_memory_bytes, sentence)


def _speed_check(options: ConvertOptions, plan: Plan, converted: ArtifactResult) -> Check:
    measured = converted.measured
    if not plan.replaced:
        what = "no form is better within the limits" if options.selects else "no convolution could be replaced"
        return Check("speed", False, f"{what}, so the files hold the original network; the plan says why")
    if measured is None or measured.speedup is None or measured.speedup_low is None:
        raise ContractError("the target's file was not compared with the original")
    is_faster = measured.speedup_low > 1
    where = f"{options.target} {options.precision.value}, {plural(measured.environment.threads, 'thread')}"
    if isinstance(measured, Counts):
        sentence = (
            f"the original needs {measured.speedup:.2f}x the modelled cycles ({measured.speedup_low:.2f} to "
            f"{measured.speedup_high:.2f} from the one end of the model to the other) on {where}; instructions were "
            "counted under emulation, no time was measured"
        )
        return Check("speed", is_faster, sentence)
    sentence = (
        f"{measured.speedup:.2f}x the original's speed (95% interval {measured.speedup_low:.2f} to "
        f"{measured.speedup_high:.2f}) on {where}"
    )
    if not is_faster:
        sentence += (
            "; it was when the plan was checked: what it runs on is busier or slower now, repeat when it is idle"
            if options.selects
            else "; try --scheme auto, another --target or another --precision"
        )
    return Check("speed", is_faster, sentence)


def _selection_notes(guard: GuardRecord) -> tuple[str, ...]:
    """What the choice by measurement had to take back."""
    if guard.selection is None:
        return ()
    names = guard.selection.given_up
    if not names:
        return guard.selection.notes
    return (
        *guard.selection.notes,
        f"{plural(len(names), 'layer')} went back to what they were, because the network as a whole did not measure "
        f"faster with them: {', '.join(names)}",
    )


def _int8_notes(inputs: Inputs, results: Sequence[ArtifactResult], mixed: MixedPlan | None = None) -> tuple[str, ...]:
    """How the converted network was prepared for int8, what each step was worth, and whether its files agree."""
    converted = [r for r in results if r.artifact.role is Role.CONVERTED]
    notes = tuple(dict.fromkeys(r.int8_note for r in converted if r.int8_note))
    steps = next((r.int8_steps for r in converted if r.int8_steps), ())  # none where ranges were trained with
    if steps and steps[0].images == len(inputs.calibration):
        notes += (
            f"int8: {plural(steps[0].images, 'calibration image')}, too few to hold some out, so nothing was tried "
            "that would have to be judged; values beyond those of so few images are clipped: give 100 images or more",
        )
    elif steps:
        said = [
            f"{step.name} {step.sqnr_after_db:.1f} dB ({step.detail})"
            if step.name == "calibration"
            else f"{step.name} {step.sqnr_after_db - step.sqnr_before_db:+.1f} dB, "
            f"{'kept' if step.is_kept else 'undone'} ({step.detail})"
            for step in steps
        ]
        images = plural(steps[0].images, "held-out calibration image")
        notes += (f"int8, by SQNR of the simulated network on {images}: {'; '.join(said)}",)
    is_mixed = mixed is not None and any(layer.reason is not None for layer in mixed.layers)
    differ = ", of which one computes some layers in float (--mixed)," if is_mixed else ""
    return notes + tuple(
        f"the int8 files of both formats{differ} agree within one step on {100 * r.int8_agreement_ratio:.1f}% of the "
        "output values"
        for r in converted
        if r.int8_agreement_ratio is not None
    )


def _quality_notes(inputs: Inputs, traced: Trace, quality: Quality) -> tuple[str, ...]:
    if quality.accuracy_ratio is None:
        return ()
    classes = traced.output_shapes[0][-1]
    named = len(inputs.validation.class_names)
    notes: tuple[str, ...] = ()
    if named and named != classes:
        notes = (f"{inputs.validation.path} has {named} class folders, but the network has {classes} classes",)
    if classes < 3 or quality.accuracy_ratio > _CHANCE_FACTOR / classes:
        return notes
    return (
        *notes,
        f"the original network gets only {100 * quality.accuracy_ratio:.1f}% of the validation images right, about "
        f"chance for {classes} classes: check the preprocessing and the order of the classes before trusting any "
        "accuracy here",
    )


def _recovery_notes(inputs: Inputs, recovery: Sequence[RecoveryStep]) -> tuple[str, ...]:
    """What limits the trust in the steps after the transfer."""
    notes: tuple[str, ...] = ()
    if recovery and len(inputs.calibration) == recovery[0].images:
        notes += (
            f"only {plural(recovery[0].images, 'calibration image')}: too few to hold some out, so the steps after the "
            "transfer were judged by the images that they were computed on",
        )
    worse = [step for step in recovery if step.is_kept and step.damage_after > step.damage_before]
    return notes + tuple(
        f"after the step '{step.name}' the outputs are further from the original's than before it "
        f"({step.damage_before:.3g} to {step.damage_after:.3g} on {plural(step.images, 'held-out image')})"
        for step in worse
    )


def _field_notes(traced: Trace, plan: Plan) -> tuple[str, ...]:
    """Whether the replaced convolutions still see the whole volume that the original ones saw."""
    shares = {}
    for name, candidate in plan.replaced.items():
        spec = traced.site(name).spec
        if spec is not None:
            shares[name] = receptive_field(candidate.form).share_of(receptive_field(spec.as_factor()))
    broken = {name: share for name, share in shares.items() if share < 1}
    if not broken:
        return ()
    worst = min(broken, key=lambda name: broken[name])
    return (
        f"{len(broken)} of {len(shares)} replaced convolutions no longer see every channel and pixel that the original "
        f"ones saw; {worst} sees {100 * broken[worst]:.3g}% of them. Features stop mixing there: prefer a scheme that "
        "keeps the volumetric receptive field (sepdeploy schemes lists them), or --overlap 1 or more",
    )


def _memory_notes(options: ConvertOptions, plan: Plan, before: MemoryProfile, after: MemoryProfile) -> tuple[str, ...]:
    """Where a separable form needs more activation memory than the convolution in whose place it is."""
    added = {}
    for name in plan.replaced:
        dense, form = (profile.module_peak_bytes(name, options.precision) for profile in (before, after))
        if dense is not None and form is not None and form > dense:
            added[name] = form / dense
    if not added or after.peak_bytes(options.precision) <= before.peak_bytes(options.precision):
        return ()
    worst = max(added, key=lambda name: added[name])
    return (
        f"the network needs more activation memory than before: {len(added)} of {len(plan.replaced)} separable forms "
        f"keep more alive while they run, {worst} {added[worst]:.2f}x as much; fewer terms or middle channels help",
    )


def _lowering_notes(options: ConvertOptions, network: nn.Module) -> tuple[str, ...]:
    """Lowerings that the user asked for and that changed no convolution, with every reason why."""
    wanted = options.lowering or ()
    chains = try_lowerings(network, wanted)
    applied = {name for chain in chains for name in chain.applied}
    reasons = {
        name: dict.fromkeys(refusal.value for chain in chains for refused, refusal in chain.refused if refused == name)
        for name in wanted
    }
    return tuple(
        f"--lowering {name} applies to no convolution: {'; '.join(reasons[name]) or 'none is replaced'}"
        for name in wanted
        if name not in applied
    )


def _file_notes(options: ConvertOptions, results: Sequence[ArtifactResult]) -> tuple[str, ...]:
    """What is wrong with single files, those included that no promise is about."""
    limit = options.max_drop_points
    converted = [r for r in results if r.artifact.role is Role.CONVERTED and r.quality is not None]
    notes = tuple(
        f"{r.artifact.path} loses {r.quality.drop_points:.2f} points on {r.quality.images} images, above the limit "
        f"of {limit:g}"
        for r in converted
        # Float files compute what the network does, which was measured on all images.
        if r.artifact.precision is Precision.INT8
        if limit is not None and r.quality is not None and r.quality.drop_points > limit
    )
    notes += tuple(
        f"{r.artifact.path} is slower than the original's file: {r.measured.speedup:.2f}x its speed"
        f"{' by modelled cycles' if r.counts else ''}"
        for r in converted
        if r.measured is not None and r.measured.speedup_high is not None and r.measured.speedup_high < 1
    )
    notes += tuple(
        f"{r.artifact.path} still computes in floating point: {', '.join(r.float_ops)}"
        for r in results
        if r.artifact.precision is Precision.INT8 and r.artifact.role is Role.CONVERTED and r.float_ops
    )
    halves = [r.artifact for r in converted if r.artifact.precision is Precision.FLOAT16]
    in_float32 = [half for half in halves if not computes_in_float16(options.output_folder / half.path, half.format)]
    if in_float32:
        notes += (
            f"{', '.join(half.path for half in in_float32)}: the weights are float16, but this machine computes with "
            "them in float32: smaller, not faster",
        )
    if saturates_u8s8() and any(r.artifact.format is Format.ONNX for r in results):
        notes += (
            "this processor saturates in uint8 x int8 products, so the weights of the int8 ONNX files keep to 7 bits",
        )
    return notes
