"""Reports built by hand, which the tests of sepdeploy.render share; the numbers are made up."""

from dataclasses import replace

from sepdeploy.core.artifact import Artifact, Format, Precision, Role
from sepdeploy.core.chain import Chain, ChainSum, Factor
from sepdeploy.core.conv import ConvCall, ConvSite, ConvSpec, Trace
from sepdeploy.core.int8_proof import FloatLayer, FloatReason, Int8Proof, LayerSqnr
from sepdeploy.core.measurement import Counts, Environment, Latency, Method, Numerics, Quality
from sepdeploy.core.memory import ActivationMemory
from sepdeploy.core.plan import Candidate, Decision, Kept, Plan, Reason, Replaced, SchemeOptions
from sepdeploy.core.report import ArtifactResult, Check, DataSummary, GuardStep, LayerTransfer, NetworkCost, Report
from sepdeploy.core.training import RecoveryStep

HOSTILE_NAME = "<script>alert('x')</script>&[red]\x1b[2J\u202e\udcff"
LONG_NAME = "backbone." + "inverted_residual_block_with_a_long_name." * 4 + "conv"

Named = dict[str, dict[str, Candidate | Kept]]


def separable_form(channels: int, size: int, terms: int = 2) -> ChainSum:
    depthwise = Factor(channels, channels, (3, 3), padding=(1, 1, 1, 1), groups=channels)
    return ChainSum(terms=(Chain((depthwise, Factor(channels, channels, (1, 1)))),) * terms)


def decision(name: str, channels: int, size: int, kept: Kept | None = None) -> Decision:
    form = separable_form(channels, size)
    dense = Factor(channels, channels, (3, 3), padding=(1, 1, 1, 1))
    candidate = Candidate("depthwise_separable", form, form.macs((size, size)), form.params)
    return Decision(name, dense.macs((size, size)), dense.params, kept or Replaced(candidate))


PLAN = Plan(
    scheme="depthwise_separable",
    options=SchemeOptions(),
    decisions=(
        Decision("conv1", 442_368, 432, Kept(Reason.FEW_CHANNELS, "3 input channels")),
        decision("layer1.0.conv1", 16, 32, Kept(Reason.EXCEEDS_MAX_DROP, "3.20 points with it")),
        decision("layer1.0.conv2", 16, 32),
        decision("layer2.0.conv2", 32, 16),
        decision("layer3.0.conv2", 64, 8),
        decision("layer3.1.conv1", 64, 8),
    ),
)


def environment(runtime: str) -> Environment:
    return Environment(cpu="Example CPU 3.0 GHz", cores=2, system="Linux x86_64", runtime=runtime, threads=1)


def latency(median_ms: float, speedup: float | None, *, runtime: str = "ai-edge-litert 2.3.0") -> Latency:
    return Latency(
        median_ms=median_ms,
        minimum_ms=median_ms * 0.95,
        p10_ms=median_ms * 0.97,
        p90_ms=median_ms * 1.12,
        repeats=400,
        warmup=20,
        method=Method.WALL_CLOCK,
        environment=environment(runtime),
        artifact_sha256="c" * 64,
        speedup=speedup,
        speedup_low=None if speedup is None else speedup * 0.97,
        speedup_high=None if speedup is None else speedup * 1.04,
    )


def quality(accuracy_ratio: float, drop_points: float, sqnr_db: float | None, error: float = 0.0) -> Quality:
    return Quality(
        images=2000,
        accuracy_ratio=accuracy_ratio,
        agreement_ratio=1 - drop_points / 50,
        sqnr_db=sqnr_db,
        relative_error=error,
        drop_points=drop_points,
        drop_basis="accuracy",
    )


def artifact(format: Format, precision: Precision, role: Role, size_bytes: int) -> Artifact:
    return Artifact(
        path=f"{role.value}-{precision.value}.{format.value}",
        format=format,
        precision=precision,
        role=role,
        is_channels_last=format is Format.TFLITE,
        size_bytes=size_bytes,
        sha256=f"{len(role.value) * 7 + size_bytes:064x}",
    )


def int8_proof(role: Role) -> Int8Proof:
    """All in int8 in the original's file; all but two layers, which do not round away, in the converted one's."""
    floats = (
        FloatLayer("head.up", "TRANSPOSE_CONV", 12_288, FloatReason.NO_KERNEL),
        FloatLayer("layer3.0.conv2", "CONV_2D", 640, FloatReason.WEIGHTS_ONLY),
    )
    layers = (
        LayerSqnr("conv1", "CONV_2D", None, 39.6),
        LayerSqnr("layer1.0.conv1", "CONV_2D", 39.6, 31.24),
        LayerSqnr("layer1.0.conv2", "CONV_2D", 31.24, 33.0),
        LayerSqnr("layer2.0.conv1", "CONV_2D", 30.9, 28.01),
        LayerSqnr("layer2.0.conv2", "DEPTHWISE_CONV_2D", 28.01, 22.5),
        LayerSqnr("layer3.0.conv1", "CONV_2D", 22.9, 22.5),
        LayerSqnr("layer3.1.conv1", "CONV_2D", 22.9, 22.89),
        LayerSqnr("fc", "FULLY_CONNECTED", 22.5, 22.4),
    )
    if role is Role.ORIGINAL:
        return Int8Proof(40_551_040, 40_551_040, (), layers[:2], 32, is_held_out=True)
    left = sum(layer.macs for layer in floats)
    return Int8Proof(141_212_096, 141_212_096 - left, floats, layers, 32, is_held_out=True)


def results() -> tuple[ArtifactResult, ...]:
    f32, int8, ort = Precision.FLOAT32, Precision.INT8, "onnxruntime 1.31.1"
    original, converted = Role.ORIGINAL, Role.CONVERTED
    before, after = quality(0.8855, 0.0, None), quality(0.8815, 0.4, 21.4, 0.085)
    int8_before, int8_after = quality(0.8850, 0.05, 30.12, 0.031), quality(0.8805, 0.5, 20.9, 0.09)
    rows = (
        (Format.ONNX, f32, original, 1_099_231, before, latency(0.562, None, runtime=ort), 1.2e-6, ()),
        (Format.ONNX, f32, converted, 412_345, after, latency(0.301, 1.87, runtime=ort), 2.4e-6, ()),
        (Format.TFLITE, f32, original, 1_090_112, before, latency(0.748, None), 1.9e-6, ()),
        (Format.TFLITE, f32, converted, 409_120, after, latency(0.355, 2.107), 2.1e-5, ()),
        (Format.TFLITE, int8, original, 305_448, int8_before, latency(0.377, None), 0.41, ()),
        (Format.TFLITE, int8, converted, 141_720, int8_after, latency(0.205, 1.84), 0.53, ("Softmax x1",)),
    )
    return tuple(
        ArtifactResult(
            artifact(kind, precision, role, size),
            score,
            time,
            error,
            float_ops,
            int8=int8_proof(role) if precision is int8 else None,
        )
        for kind, precision, role, size, score, time, error, float_ops in rows
    )


def success_report() -> Report:
    return Report(
        version="0.1.0",
        model="weights/resnet20.pt",
        arch="models.resnet_cifar:resnet20",
        command="sepdeploy convert weights/resnet20.pt --arch models.resnet_cifar:resnet20 --data photos --max-drop 1",
        seed=0,
        target="litert",
        precision=Precision.INT8,
        max_drop_points=1.0,
        guard_limit_points=4.0,
        input_shape=(1, 3, 32, 32),
        calibration=DataSummary("photos/calibration", 512, True, (), "a" * 64),
        validation=DataSummary("photos/validation", 2000, True, ("broken.jpg",), "b" * 64),
        original=NetworkCost(40_551_040, 269_722, 6),
        converted=NetworkCost(14_212_096, 101_530, 6),
        original_memory=ActivationMemory(208_896, 52_224),
        converted_memory=ActivationMemory(274_432, 68_608),
        plan=PLAN,
        transfer=(
            LayerTransfer("layer1.0.conv2", 0.412, 0.121, "anchored"),
            LayerTransfer("layer2.0.conv2", 0.381, 0.094, "anchored"),
            LayerTransfer("layer3.0.conv2", 0.365, 0.088, "anchored"),
            LayerTransfer("layer3.1.conv1", 0.298, None, "data-free"),
        ),
        guard=(
            GuardStep(("layer3.1.conv1", "layer3.0.conv2"), 2, 0.15, 2000, True),
            GuardStep(("layer2.0.conv2", "layer1.0.conv2"), 4, 0.4, 2000, True),
            GuardStep(("layer1.0.conv1",), 5, 3.2, 512, False, True),
        ),
        recovery=(
            RecoveryStep("batch norm re-estimation", 0.0712, 0.0934, 128, is_kept=False),
            RecoveryStep("bias correction", 0.0712, 0.0655, 128, is_kept=True, detail="6 layers"),
            RecoveryStep("reconstruction", 0.0655, 0.0121, 128, is_kept=True, detail="4 blocks of 100 steps"),
        ),
        original_quality=quality(0.8855, 0.0, None),
        transferred_quality=quality(0.8612, 2.43, 14.9, 0.18),
        converted_quality=quality(0.8815, 0.4, 21.4, 0.085),
        artifacts=results(),
        checks=(
            Check("accuracy", True, "0.50 points lost on 2,000 images, at most 1.00 allowed"),
            Check("speed", True, "1.84x faster than the original, 95% interval 1.78 to 1.91"),
        ),
        notes=("The mean and standard deviation of the pixels were assumed to be ImageNet's.",),
    )


def with_quality(report: Report, **changes: object) -> Report:
    """The report with the same `changes` to every quality but those of the originals."""

    def changed(score: Quality, is_original: bool) -> Quality:
        if not is_original:
            return replace(score, **changes)
        return replace(score, **{key: value for key, value in changes.items() if value is None or key == "drop_basis"})

    artifacts = tuple(
        replace(each, quality=each.quality and changed(each.quality, is_original=each.artifact.role is Role.ORIGINAL))
        for each in report.artifacts
    )
    return replace(
        report,
        original_quality=changed(report.original_quality, is_original=True),
        transferred_quality=changed(report.transferred_quality, is_original=False),
        converted_quality=changed(report.converted_quality, is_original=False),
        artifacts=artifacts,
    )


def agreement_report() -> Report:
    report = with_quality(
        success_report(), accuracy_ratio=None, agreement_ratio=0.972, drop_points=2.8, drop_basis="agreement"
    )
    return replace(report, checks=(report.checks[1],), max_drop_points=None, guard_limit_points=None, guard=())


def regression_report() -> Report:
    report = with_quality(
        success_report(),
        accuracy_ratio=None,
        agreement_ratio=None,
        drop_points=3.1,
        drop_basis="relative error",
        relative_error=0.031,
    )
    return replace(report, checks=(report.checks[1],))


def slow_report() -> Report:
    report = success_report()
    broken = Check("speed", False, "1.09x slower than the original, 95% interval 1.05 to 1.13")
    *others, last = report.artifacts
    return replace(
        report,
        checks=(report.checks[0], broken),
        artifacts=(*others, replace(last, latency=latency(0.411, 0.917))),
    )


def nothing_replaced_report() -> Report:
    report = success_report()
    kept = Kept(Reason.NOT_CHEAPER)
    plan = replace(PLAN, decisions=tuple(replace(each, outcome=kept) for each in PLAN.decisions))
    return replace(
        report,
        plan=plan,
        converted=report.original,
        converted_memory=report.original_memory,
        transfer=(),
        guard=(),
        recovery=(),
        transferred_quality=report.original_quality,
        converted_quality=report.original_quality,
        artifacts=(),
        checks=(),
    )


def hostile_report() -> Report:
    report = success_report()
    first, second, *others = PLAN.decisions
    plan = replace(PLAN, decisions=(replace(first, name=HOSTILE_NAME), replace(second, name=LONG_NAME), *others))
    *others_, last = report.artifacts
    return replace(
        report,
        model=HOSTILE_NAME,
        arch=HOSTILE_NAME,
        command=HOSTILE_NAME,
        plan=plan,
        notes=(HOSTILE_NAME,),
        calibration=replace(report.calibration, path=HOSTILE_NAME, skipped=(HOSTILE_NAME,)),
        guard=(GuardStep((HOSTILE_NAME,), 1, 0.1, 2000, True),),
        recovery=(RecoveryStep(HOSTILE_NAME, 0.2, 0.1, 128, is_kept=True, detail=HOSTILE_NAME),),
        transfer=(LayerTransfer(HOSTILE_NAME, 0.4, 0.1, HOSTILE_NAME),),
        checks=(Check(HOSTILE_NAME, True, HOSTILE_NAME),),
        artifacts=(
            *others_,
            replace(
                last,
                artifact=replace(last.artifact, path=f"{LONG_NAME}/{HOSTILE_NAME}"),
                int8=Int8Proof(
                    7,
                    0,
                    (FloatLayer(HOSTILE_NAME, HOSTILE_NAME, 7, FloatReason.INPUT),),
                    (LayerSqnr(HOSTILE_NAME, HOSTILE_NAME, 30.0, 1.0),),
                ),
            ),
        ),
    )


def half_measured_report() -> Report:
    """As of a board that has no runtime for the other format."""
    report = success_report()
    artifacts = tuple(
        replace(each, latency=None) if each.artifact.format is Format.ONNX else each for each in report.artifacts
    )
    return replace(report, artifacts=artifacts)


def counts(low: float, speedup: float | None) -> Counts:
    return Counts(
        core="Cortex-A72",
        instructions=12_345_678,
        classes={"vector_multiply_accumulate": 9_000_000, "vector_load": 3_000_000, "vector_store": 345_678},
        macs=40_600_000,
        loaded_bytes=48_000_000,
        stored_bytes=5_530_848,
        l1_misses=98_765,
        l2_misses=4_321,
        kcycles_low=low,
        kcycles_high=1.4 * low,
        clock_ghz=1.5,
        repeats=3,
        spread_ratio=0.0021,
        method=Method.EMULATED_COUNT,
        environment=replace(environment("ai-edge-litert 2.3.0"), cpu="Cortex-A72 emulated by qemu-aarch64 7.2.22"),
        artifact_sha256="c" * 64,
        speedup=speedup,
        speedup_low=speedup,
        speedup_high=None if speedup is None else 1.2 * speedup,
    )


def counted_report() -> Report:
    """Files of an emulated core: the ONNX files of the other runtime were not counted, and one does not run there."""
    report = success_report()
    same = Numerics("Cortex-A72", 2.5e-7, 1e-4, False, "", "", "c" * 64)
    found = {
        (Format.ONNX, Precision.FLOAT32): replace(same, difference=None, failure="the guest crashed (SIGILL)"),
        (Format.TFLITE, Precision.INT8): Numerics("Cortex-A72", 3.0, 1.0, True, "CONV_2D layer3.0", "", "c" * 64),
    }
    artifacts = tuple(
        replace(
            each,
            latency=None,
            counts=None if each.artifact.format is Format.ONNX else counts(7000, 2.1 if i % 2 else None),
            numerics=found.get((each.artifact.format, each.artifact.precision), same),
        )
        for i, each in enumerate(report.artifacts)
    )
    return replace(report, target="cortex-a72", artifacts=artifacts)


REPORTS = {
    "success": success_report,
    "agreement": agreement_report,
    "regression": regression_report,
    "slow": slow_report,
    "nothing_replaced": nothing_replaced_report,
    "hostile": hostile_report,
    "half_measured": half_measured_report,
    "counted": counted_report,
}


def trace_and_candidates() -> tuple[Trace, Named]:
    def site(name: str, spec: ConvSpec, size: int, calls: int = 1, reason: Reason | None = None) -> ConvSite:
        factor = spec.as_factor()
        height, width = factor.output_size((size, size))
        shapes = (1, spec.in_channels, size, size), (1, spec.out_channels, height, width)
        call = ConvCall(*shapes, macs=factor.macs((size, size)))
        return ConvSite(name, "Conv2d", spec, (call,) * calls, spec.params, reason=reason)

    padding = (1, 1, 1, 1)
    sites = (
        site("stem", ConvSpec(3, 16, (3, 3), padding=padding), 32),
        site(LONG_NAME, ConvSpec(16, 16, (3, 3), padding=padding), 32, calls=2),
        site("down", ConvSpec(16, 32, (3, 3), (2, 2), padding), 32),
        site("mobile", ConvSpec(32, 32, (3, 3), padding=padding, groups=32), 16),
        site("wide", ConvSpec(32, 64, (5, 5), (2, 1), (2, 2, 2, 2), dilation=(2, 2), groups=4), 16),
        ConvSite("conv1d.0", "Conv1d", None, (ConvCall((1, 8, 40), (1, 8, 40), 7_680),), 192, reason=Reason.NOT_CONV2D),
        ConvSite("unused", "Conv2d", ConvSpec(8, 8, (3, 3)), (), 576, reason=Reason.NOT_CALLED),
    )
    macs = sum(each.macs for each in sites)
    trace = Trace(sites, (1, 3, 32, 32), ((1, 10),), macs + 640, sum(each.params for each in sites) + 650)

    def offers(each: ConvSite) -> dict[str, Candidate | Kept]:
        if each.reason:
            return {name: Kept(each.reason) for name in ("depthwise_separable", "spatial_separable")}
        if each.name == "stem":
            return {name: Kept(Reason.FEW_CHANNELS) for name in ("depthwise_separable", "spatial_separable")}
        if each.name == "mobile":
            return {name: Kept(Reason.DEPTHWISE) for name in ("depthwise_separable", "spatial_separable")}
        form = separable_form(16, 32)
        return {
            "depthwise_separable": Candidate("depthwise_separable", form, each.macs // 4, form.params),
            "spatial_separable": Candidate("spatial_separable", form, each.macs // 3, form.params),
        }

    return trace, {each.name: offers(each) for each in sites}
