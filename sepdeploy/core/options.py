"""Everything that one conversion can be told."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from sepdeploy.core.artifact import Format, Precision
from sepdeploy.core.plan import SchemeOptions
from sepdeploy.core.training import ReconstructOptions, TrainOptions
from sepdeploy.errors import UsageError

__all__ = ["RECOVERED_BY_RECONSTRUCTION", "RECOVERED_BY_TRAINING", "TARGETS", "ConvertOptions", "MovedInputs"]

TARGETS: dict[str, Format] = {"ort": Format.ONNX, "litert": Format.TFLITE}
"""Runtime on this CPU -> the file format that it runs."""

RECOVERED_BY_RECONSTRUCTION = 3.0
"""Points beyond --max-drop that the guard lets through because block reconstruction may win them back."""

RECOVERED_BY_TRAINING = 10.0
"""The same with fine-tuning, sepdeploy's own or the user's. Too much costs a second training, never the promise."""


@dataclass(frozen=True, slots=True)
class ConvertOptions:
    """What `sepdeploy convert` does; field by field the options of the command line.

    Attributes:
        model: Checkpoint: a state_dict or training checkpoint, .pt or .safetensors.
        arch: Architecture: 'models.X:factory', 'file.py:factory', 'package.module:factory' or 'timm:NAME'.
        calibration: Images for transfer and int8 ranges: folder, .npz or manifest.
        validation: Images that quality is measured on; None holds out a quarter of the calibration images.
        preprocess: TOML file with the preprocessing; None takes a manifest's own, else RGB / 255.
        input_shape: (C, H, W); None takes the preprocessing's size, or the images' own.
        scheme: Name of the scheme.
        scheme_options: Its hyper-parameters.
        includes_linear: Whether to replace nn.Linear layers too, as 1x1 convolutions.
        max_drop_points: Most accuracy that may be lost; None replaces all that the scheme can make cheaper.
        recoverable_points: By how much the guard may exceed that, because reconstruction and training come after it;
            None takes what they usually win back.
        target: Runtime that the promises are about.
        precision: Precision that the promises are about.
        formats: Files to make.
        lowering: How separable forms are written down in the files: lowerings in the order of their application, none
            if empty; None takes those that suit each file.
        transfer: 'anchored' or 'data-free'; without data nothing is reconstructed either.
        reconstruct: How blocks are trained to imitate the original's, without labels; None leaves it out.
        train: Images to fine-tune on; None for no fine-tuning.
        training: How.
        finetune_hook: The user's own training, 'file.py:function' or 'package.module:function'.
        calibration_images: Most calibration images to use.
        threads: Threads of the runtimes in the latency measurement.
        bench_seconds: Time per file for the latency measurement.
        seed: Seed of the choice of images.
        output: The bundle; None names it after the model, in the working directory.
        command: The command line, for the record.

    Raises:
        UsageError: if two options contradict each other or one is out of range.
    """

    model: Path
    arch: str
    calibration: str
    validation: str | None = None
    preprocess: Path | None = None
    input_shape: tuple[int, int, int] | None = None
    scheme: str = "depthwise_separable"
    scheme_options: SchemeOptions = field(default_factory=SchemeOptions)
    includes_linear: bool = False
    max_drop_points: float | None = None
    recoverable_points: float | None = None
    target: str = "ort"
    precision: Precision = Precision.FLOAT32
    formats: tuple[Format, ...] = (Format.ONNX, Format.TFLITE)
    lowering: tuple[str, ...] | None = None
    transfer: str = "anchored"
    reconstruct: ReconstructOptions | None = field(default_factory=ReconstructOptions)
    train: str | None = None
    training: TrainOptions = field(default_factory=TrainOptions)
    finetune_hook: str | None = None
    calibration_images: int = 512
    threads: int = 1
    bench_seconds: float = 2.0
    seed: int = 0
    output: Path | None = None
    command: str = ""

    def __post_init__(self) -> None:
        if self.target not in TARGETS:
            raise UsageError(f"there is no target '{self.target}'; choose one of {', '.join(TARGETS)}")
        if not self.formats:
            raise UsageError("--formats names no format; choose from onnx, tflite")
        if TARGETS[self.target] not in self.formats:
            raise UsageError(
                f"--target {self.target} runs {TARGETS[self.target].value} files, which --formats leaves out; add it"
            )
        if self.lowering is not None and len(set(self.lowering)) < len(self.lowering):
            raise UsageError(f"--lowering names one twice: {','.join(self.lowering)}")
        if self.transfer not in ("anchored", "data-free"):
            raise UsageError(f"there is no transfer '{self.transfer}'; choose anchored or data-free")
        if self.max_drop_points is not None and not 0 <= self.max_drop_points <= 100:
            raise UsageError(f"--max-drop is in points, 0 to 100, got {self.max_drop_points:g}")
        if self.recoverable_points is not None and self.max_drop_points is None:
            raise UsageError("--recoverable adds to --max-drop: give both or neither")
        if self.recoverable_points is not None and not 0 <= self.recoverable_points <= 100:
            raise UsageError(f"--recoverable is in points, 0 to 100, got {self.recoverable_points:g}")
        if self.calibration_images < 1 or self.threads < 1 or self.seed < 0 or not self.bench_seconds > 0:
            raise UsageError("--calibration-images, --threads and the bench time must be positive, --seed at least 0")

    @property
    def output_folder(self) -> Path:
        """Where the bundle goes."""
        return self.output if self.output is not None else Path(f"{self.model.stem}.sepdeploy")

    @property
    def reconstructs(self) -> bool:
        """Whether blocks are reconstructed; a transfer without data stays without."""
        return self.reconstruct is not None and self.transfer == "anchored"

    def slack_points(self, *, is_trained: bool) -> float:
        """By how much the guard may exceed `max_drop_points`, given whether the network is fine-tuned after it."""
        if self.recoverable_points is not None:
            return self.recoverable_points
        if is_trained:
            return RECOVERED_BY_TRAINING
        return RECOVERED_BY_RECONSTRUCTION if self.reconstructs else 0.0


@dataclass(frozen=True, slots=True)
class MovedInputs:
    """Where the inputs of a finished bundle are now, if not where its conversion found them; None where they are.

    Attributes:
        model: As in `ConvertOptions`, like the others.
        arch: With the same code.
        calibration: Other images change the int8 files, and what training is judged by.
        validation: Other images change what quality is measured on.
        preprocess: With the same content.
    """

    model: Path | None = None
    arch: str | None = None
    calibration: str | None = None
    validation: str | None = None
    preprocess: Path | None = None
