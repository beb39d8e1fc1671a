"""The report of one conversion: every number that the user is shown, with where it comes from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sepdeploy.core.artifact import Artifact, Format, Precision, Role
from sepdeploy.core.int8 import Int8Step
from sepdeploy.core.int8_proof import Int8Proof
from sepdeploy.core.looser_plan import LooserPlan
from sepdeploy.core.measurement import Counts, Latency, Measured, Numerics, Quality
from sepdeploy.core.memory import ActivationMemory
from sepdeploy.core.mixed import MixedPlan
from sepdeploy.core.plan import Plan
from sepdeploy.core.training import RecoveryStep

__all__ = [
    "ArtifactResult",
    "Check",
    "DataSummary",
    "Drops",
    "Fault",
    "GuardStep",
    "LayerTransfer",
    "NetworkCost",
    "Report",
    "SelectionSummary",
]


@dataclass(frozen=True, slots=True)
class NetworkCost:
    """Cost of one network, computed from its shapes.

    Attributes:
        macs: Multiply-accumulates for one image: convolutions and matrix products.
        params: Parameters.
        convs: Convolutions, replaced or not (a replaced one counts once).
    """

    macs: int
    params: int
    convs: int


@dataclass(frozen=True, slots=True)
class DataSummary:
    """A set of images that the run used.

    Attributes:
        path: As the user gave it.
        images: Images used.
        is_labelled: Whether labels were found.
        skipped: Files that could not be read as images.
        sha256: Hash of the preprocessed pixels and labels.
    """

    path: str
    images: int
    is_labelled: bool
    skipped: tuple[str, ...]
    sha256: str


@dataclass(frozen=True, slots=True)
class GuardStep:
    """One growth of the replaced set that the guard measured.

    Attributes:
        added: Convolutions that this step added to the replaced set.
        replaced: Size of the replaced set with them.
        drop_points: Measured drop of the network with them (Quality.drop_points), on `images` images.
        images: Validation images evaluated before the verdict.
        is_accepted: Whether the set was kept.
        is_partial: Whether the evaluation stopped early because the limit was clearly broken or clearly held.
    """

    added: tuple[str, ...]
    replaced: int
    drop_points: float
    images: int
    is_accepted: bool
    is_partial: bool = False


@dataclass(frozen=True, slots=True)
class LayerTransfer:
    """How well one replaced convolution imitates the original one, before any training.

    Attributes:
        name: The convolution.
        kernel_error: |W - W'| / |W| of the data-free factors (Frobenius norm).
        output_error: The same for the layer's outputs on calibration images, after the anchored solve.
        method: The transfer that was kept: 'data-free' or 'anchored'.
    """

    name: str
    kernel_error: float
    output_error: float | None
    method: str


@dataclass(frozen=True, slots=True)
class ArtifactResult:
    """One deployable file with its measurements.

    Attributes:
        artifact: The file.
        quality: Its outputs on the validation images, against the original PyTorch network.
        latency: Its latency, measured interleaved with the other files of the same runtime.
        max_abs_error: Largest |output - output of the PyTorch network it was exported from| on real images.
        float_ops: For int8 files: operators that still compute in floating point, with their count ('Softmax x1').
        int8_steps: For int8 files: what was tried before quantizing.
        int8_note: For int8 files: why nothing could be tried.
        int8: For int8 files: the share of multiply-accumulates in int8, and what each layer loses.
        counts: What it executes on the target, where that is an emulated core: then there is no latency.
        int8_agreement_ratio: For int8 TFLite files: share of output values that are within one step of those of the
            int8 ONNX file; None where that is not known.
        numerics: Whether it computes the same on the target, where that is an emulated core.
    """

    artifact: Artifact
    quality: Quality | None
    latency: Latency | None
    max_abs_error: float | None
    float_ops: tuple[str, ...] = ()
    int8_steps: tuple[Int8Step, ...] = ()
    int8_note: str = ""
    int8: Int8Proof | None = None
    int8_agreement_ratio: float | None = None
    counts: Counts | None = None
    numerics: Numerics | None = None

    @property
    def measured(self) -> Measured | None:
        """What it costs on the target's processor."""
        return self.latency or self.counts


@dataclass(frozen=True, slots=True)
class Drops:
    """Points lost on the same validation images, against the original PyTorch network.

    Attributes:
        file: By the target's file of the converted network.
        network: By the converted PyTorch network.
        original_file: By the target's file of the original network; None where it was not measured.
    """

    file: float
    network: float
    original_file: float | None

    @property
    def quantization(self) -> float:
        """What comes on top from the network to its file."""
        return self.file - self.network


@dataclass(frozen=True, slots=True)
class Fault:
    """A stage without which a promise would have held.

    Attributes:
        stage: 'transfer', with all that wins accuracy back after it, or 'quantization'.
        points: What it lost, in the points of --max-drop.
        advice: What would help, as options of the command line.
    """

    stage: Literal["transfer", "quantization"]
    points: float
    advice: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Check:
    """A promise and whether it holds.

    Attributes:
        name: 'accuracy', 'numerics', 'speed', 'latency', 'size' or 'memory'.
        is_met: Whether it holds.
        sentence: What was measured against what limit, for the user.
        faults: For a broken promise of accuracy: the stages at fault, the costlier first.
    """

    name: str
    is_met: bool
    sentence: str
    faults: tuple[Fault, ...] = ()


@dataclass(frozen=True, slots=True)
class SelectionSummary:
    """How the cost of a chosen plan was predicted and what it measured.

    Attributes:
        unit: Of the costs.
        original_cost: Of the whole original network when the candidates were priced, median.
        predicted_cost: Of the plan: that and the differences of all its blocks.
        measured_cost: Of its file, in the same run as the original; None where nothing is replaced.
        speedup: Measured, None likewise.
        speedup_low: Lower end of its interval.
        speedup_high: Upper end.
        given_up: Layers that went back to what they were because the whole did not measure faster.
        notes: What the user should know of the pricing.
    """

    unit: str
    original_cost: float
    predicted_cost: float
    measured_cost: float | None
    speedup: float | None
    speedup_low: float | None
    speedup_high: float | None
    given_up: tuple[str, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Report:
    """One conversion, whole.

    Attributes:
        version: Version of sepdeploy.
        model: The checkpoint, as given.
        arch: The architecture, as given.
        command: The command line, or the equivalent of a call from Python.
        seed: Seed of the run.
        target: Name of the target that the speed check is about.
        precision: Precision that both checks are about.
        max_drop_points: Most that the target's file may lose; None if there was no limit.
        guard_limit_points: Limit of the guard, which measures before recovery and after which quantization comes.
        input_shape: (1, C, H, W), or (1, H, W, C).
        calibration: Images that the transfer and the int8 ranges come from.
        validation: Images that quality is measured on and that the guard decided by.
        original: Cost of the original network.
        converted: Cost of the converted one.
        original_memory: Peak activation memory of the original network.
        converted_memory: The same of the converted one.
        plan: What became of each convolution.
        transfer: One entry per replaced convolution.
        guard: The growth of the replaced set, step by step.
        recovery: What was tried after the transfer to win accuracy back, in order.
        original_quality: Of the original PyTorch network.
        transferred_quality: Of the converted PyTorch network before recovery.
        converted_quality: Of the converted PyTorch network.
        artifacts: Every deployable file, original and converted.
        checks: The promises.
        notes: Sentences that the user should read, such as what was assumed.
        selection: How the plan's cost was predicted and measured; None unless it was chosen layer by layer.
        mixed: What `--mixed auto` came to; None without it.
        looser_plan: What became of the cheaper plan that recovery left room for; None where none was tried.
    """

    version: str
    model: str
    arch: str
    command: str
    seed: int
    target: str
    precision: Precision
    max_drop_points: float | None
    guard_limit_points: float | None
    input_shape: tuple[int, ...]
    calibration: DataSummary
    validation: DataSummary
    original: NetworkCost
    converted: NetworkCost
    original_memory: ActivationMemory
    converted_memory: ActivationMemory
    plan: Plan
    transfer: tuple[LayerTransfer, ...]
    guard: tuple[GuardStep, ...]
    recovery: tuple[RecoveryStep, ...]
    original_quality: Quality
    transferred_quality: Quality
    converted_quality: Quality
    artifacts: tuple[ArtifactResult, ...]
    checks: tuple[Check, ...]
    notes: tuple[str, ...]
    selection: SelectionSummary | None = None
    mixed: MixedPlan | None = None
    looser_plan: LooserPlan | None = None

    @property
    def is_success(self) -> bool:
        """Whether every promise holds."""
        return all(check.is_met for check in self.checks)

    def result(self, format: Format, precision: Precision, role: Role) -> ArtifactResult | None:
        """The file of that kind, None if the run did not make one."""
        for result in self.artifacts:
            artifact = result.artifact
            if (artifact.format, artifact.precision, artifact.role) == (format, precision, role):
                return result
        return None
