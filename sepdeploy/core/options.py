"""Everything that one conversion can be told."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from sepdeploy.core.artifact import Format, Precision
from sepdeploy.core.plan import SchemeOptions
from sepdeploy.errors import UsageError

__all__ = ["TARGETS", "ConvertOptions"]

TARGETS: dict[str, Format] = {"ort": Format.ONNX, "litert": Format.TFLITE}
"""Runtime on this CPU -> the file format that it runs."""


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
        max_drop_points: Limit of the guard; None replaces all that the scheme can make cheaper.
        target: Runtime that the promises are about.
        precision: Precision that the promises are about.
        formats: Files to make.
        lowering: How separable forms are written down in the files: lowerings in the order of their application, none
            if empty; None takes those that suit each file.
        transfer: 'anchored' or 'data-free'.
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
    target: str = "ort"
    precision: Precision = Precision.FLOAT32
    formats: tuple[Format, ...] = (Format.ONNX, Format.TFLITE)
    lowering: tuple[str, ...] | None = None
    transfer: str = "anchored"
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
        if self.calibration_images < 1 or self.threads < 1 or self.seed < 0 or not self.bench_seconds > 0:
            raise UsageError("--calibration-images, --threads and the bench time must be positive, --seed at least 0")

    @property
    def output_folder(self) -> Path:
        """Where the bundle goes."""
        return self.output if self.output is not None else Path(f"{self.model.stem}.sepdeploy")
