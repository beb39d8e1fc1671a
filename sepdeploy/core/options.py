"""Everything that one conversion can be told."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from sepdeploy.core.artifact import Format, Precision
from sepdeploy.core.int8 import Int8Options
from sepdeploy.core.plan import SchemeOptions
from sepdeploy.core.ssh_address import SCHEME, SshAddress
from sepdeploy.core.training import ReconstructOptions, TrainOptions
from sepdeploy.errors import UsageError

__all__ = [
    "AUTO",
    "DEFAULT_MAX_DROP",
    "RECOVERED_BY_RECONSTRUCTION",
    "RECOVERED_BY_TRAINING",
    "TARGETS",
    "TARGET_TITLES",
    "ConvertOptions",
    "Goal",
    "MovedInputs",
    "SelectionOptions",
    "require_own_training",
    "target_for",
    "target_format",
    "target_title",
]

TARGETS: dict[str, Format] = {
    "ort": Format.ONNX,
    "litert": Format.TFLITE,
    "cortex-a53": Format.TFLITE,
    "cortex-a53:ort": Format.ONNX,
    "cortex-a55": Format.TFLITE,
    "cortex-a55:ort": Format.ONNX,
    "cortex-a72": Format.TFLITE,
    "cortex-a72:ort": Format.ONNX,
    "cortex-a76": Format.TFLITE,
    "cortex-a76:ort": Format.ONNX,
}
"""Target -> the file format that it runs; how it is measured is in `planning/target.py`."""

TARGET_TITLES: dict[str, str] = {
    "ort": "ONNX Runtime",
    "litert": "LiteRT",
    "cortex-a53": "Cortex-A53 (emulated) LiteRT",
    "cortex-a53:ort": "Cortex-A53 (emulated) ONNX Runtime",
    "cortex-a55": "Cortex-A55 (emulated) LiteRT",
    "cortex-a55:ort": "Cortex-A55 (emulated) ONNX Runtime",
    "cortex-a72": "Cortex-A72 (emulated) LiteRT",
    "cortex-a72:ort": "Cortex-A72 (emulated) ONNX Runtime",
    "cortex-a76": "Cortex-A76 (emulated) LiteRT",
    "cortex-a76:ort": "Cortex-A76 (emulated) ONNX Runtime",
}
"""Target -> its name in sentences."""

RECOVERED_BY_RECONSTRUCTION = 3.0
"""Points beyond --max-drop that the guard lets through because block reconstruction may win them back."""

RECOVERED_BY_TRAINING = 10.0
"""The same with fine-tuning, sepdeploy's own or the user's. Too much costs a second training, never the promise."""


AUTO = "auto"
"""In the place of a scheme's name: every layer gets the form, or none, that is best for the target."""

DEFAULT_MAX_DROP = 1.0
"""Points that a selection may lose if no limit of any kind is given."""

Goal = Literal["latency", "macs", "params"]
"""What a selection makes small."""


_ON_ORT = ":ort"
"""Ends the name of a target on which ONNX Runtime runs where its name alone means LiteRT."""


def target_format(name: str) -> Format:
    """The format that the target runs: one of `TARGETS`, or a board as ssh://USER@HOST[:PORT][:ort].

    Raises:
        UsageError: if there is no such target.

    >>> target_format("ssh://pi@board:22"), target_format("ssh://pi@board:ort")
    (<Format.TFLITE: 'tflite'>, <Format.ONNX: 'onnx'>)
    """
    if name in TARGETS:
        return TARGETS[name]
    if not name.startswith(SCHEME):
        raise UsageError(f"there is no target '{name}'; choose one of {', '.join(TARGETS)} or ssh://USER@HOST")
    SshAddress.parse(name.removesuffix(_ON_ORT))
    return Format.ONNX if name.endswith(_ON_ORT) else Format.TFLITE


def target_title(name: str) -> str:
    """The target in sentences.

    Raises:
        UsageError: if there is no such target.

    >>> target_title("ssh://pi@board")
    'LiteRT on ssh://pi@board'
    """
    if name in TARGET_TITLES:
        return TARGET_TITLES[name]
    runtime = TARGET_TITLES["ort" if target_format(name) is Format.ONNX else "litert"]
    return f"{runtime} on {name.removesuffix(_ON_ORT)}"


def target_for(name: str, file_format: Format) -> str:
    """The target that runs files of `file_format` on the same processor as the target `name`.

    Raises:
        UsageError: if there is none.

    >>> target_for("cortex-a72", Format.ONNX), target_for("cortex-a72:ort", Format.TFLITE)
    ('cortex-a72:ort', 'cortex-a72')
    """
    if target_format(name) is file_format:
        return name
    device = name.removesuffix(_ON_ORT)
    alike = ("ort", "litert") if device in {"ort", "litert"} else (device, f"{device}{_ON_ORT}")
    return next(candidate for candidate in alike if target_format(candidate) is file_format)


@dataclass(frozen=True, slots=True)
class SelectionOptions:
    """What the selection of forms makes small, and within which limits besides --max-drop.

    With a limit of latency, size or memory the damage is made small within it, else `goal` within --max-drop.

    Attributes:
        goal: What is made small.
        max_latency: Longest inference on the target, in its unit: ms, or kcycles of an emulated core.
        max_latency_ratio: The same as a share of the original's, in (0, 1].
        max_size_bytes: Largest weights in the target's precision.
        max_memory_bytes: Highest peak of activations in the target's precision.
        seconds_per_block: Most time to measure one block.
        pricing_seconds: Most time for all measurements; what is not measured by then is not chosen. None for no limit.

    Raises:
        UsageError: if a limit is out of range, or two are given.
    """

    goal: Goal = "latency"
    max_latency: float | None = None
    max_latency_ratio: float | None = None
    max_size_bytes: int | None = None
    max_memory_bytes: int | None = None
    seconds_per_block: float = 0.2
    pricing_seconds: float | None = None

    def __post_init__(self) -> None:
        if self.goal not in get_args(Goal):
            raise UsageError(f"there is no objective '{self.goal}'; choose one of {', '.join(get_args(Goal))}")
        numbers = (self.max_latency, self.max_latency_ratio, self.max_size_bytes, self.max_memory_bytes)
        if any(number is not None and not 0 < number < math.inf for number in numbers):
            raise UsageError("--max-latency, --max-ratio, --max-size and --max-memory must be above 0")
        if self.max_latency_ratio is not None and self.max_latency_ratio > 1:
            raise UsageError(
                f"--max-ratio is a share of the original's latency, at most 1, got {self.max_latency_ratio:g}"
            )
        if self.max_latency is not None and self.max_latency_ratio is not None:
            raise UsageError("--max-latency and --max-ratio say the same: give one of them")
        if self.has_limit and self.goal != "latency":
            raise UsageError(
                f"--objective {self.goal} makes that small within --max-drop; with --max-latency, --max-ratio, "
                "--max-size or --max-memory it is the damage that is made small: leave out one of the two"
            )
        if not self.seconds_per_block > 0 or (self.pricing_seconds is not None and not self.pricing_seconds > 0):
            raise UsageError("the time for measuring blocks must be above 0")

    @property
    def takes_slower_forms(self) -> bool:
        """Whether a form that is not faster may serve what is asked for."""
        return self.goal != "latency" or self.max_size_bytes is not None or self.max_memory_bytes is not None

    @property
    def has_limit(self) -> bool:
        """Whether something is limited; then damage is what is made small."""
        limits = (self.max_latency, self.max_latency_ratio, self.max_size_bytes, self.max_memory_bytes)
        return any(limit is not None for limit in limits)


def require_own_training(training: TrainOptions, train: str | None, *, is_hooked: bool) -> None:
    """See that what only sepdeploy's own training does is asked for together with that.

    Raises:
        UsageError: if quantization-aware training is asked for beside a hook or without images.
    """
    if not training.is_quantization_aware:
        return
    if is_hooked:
        raise UsageError(
            "--qat (is_quantization_aware) is part of sepdeploy's own training, whose place the hook takes: leave out "
            "one of them"
        )
    if train is None:
        raise UsageError("--qat (is_quantization_aware) needs images to train on: give --train (train=) too")


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
        scheme: Name of the scheme, or 'auto' to choose a form for every layer by measurement.
        scheme_options: Its hyper-parameters; 'auto' chooses them.
        plan: File of `sepdeploy plan`, or a bundle's plan.json, in the place of both.
        selection: What 'auto' makes small, and limits besides `max_drop_points`.
        includes_linear: Whether to replace nn.Linear layers too, as 1x1 convolutions.
        max_drop_points: Most accuracy that may be lost; None replaces all that the scheme can make cheaper, or with
            'auto' and no limit in `selection` is 1 point.
        recoverable_points: By how much the guard may exceed that, because reconstruction and training come after it;
            None takes what they usually win back.
        target: Runtime that the promises are about.
        precision: Precision that the promises are about.
        mixed: 'auto' lets layers of the target's int8 file compute in float where int8 is slower or too inaccurate.
        formats: Files to make.
        precisions: In which precisions: float32 and what is made from it.
        lowering: How separable forms are written down in the files: lowerings in the order of their application, none
            if empty; None takes those that suit each file.
        int8: How the int8 files are quantized.
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
    scheme: str = AUTO
    scheme_options: SchemeOptions = field(default_factory=SchemeOptions)
    plan: Path | None = None
    selection: SelectionOptions = field(default_factory=SelectionOptions)
    includes_linear: bool = False
    max_drop_points: float | None = None
    recoverable_points: float | None = None
    target: str = "ort"
    precision: Precision = Precision.FLOAT32
    mixed: Literal["none", "auto"] = "none"
    formats: tuple[Format, ...] = (Format.ONNX, Format.TFLITE)
    precisions: tuple[Precision, ...] = (Precision.FLOAT32, Precision.INT8)
    lowering: tuple[str, ...] | None = None
    int8: Int8Options = field(default_factory=Int8Options)
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
        if not self.formats:
            raise UsageError("--formats names no format; choose from onnx, tflite")
        file_format = target_format(self.target)
        if file_format not in self.formats:
            raise UsageError(
                f"--target {self.target} runs {file_format.value} files, which --formats leaves out; add it"
            )
        if Precision.FLOAT32 not in self.precisions:
            raise UsageError("--precisions must have float32: all other files are made from that one")
        if self.precision is Precision.FLOAT16:
            raise UsageError("--precision is float32 or int8: float16 files compute in float32 on most processors")
        if self.mixed not in ("none", "auto"):
            raise UsageError(f"--mixed is none or auto, got '{self.mixed}'")
        if self.mixed == "auto" and self.precision is not Precision.INT8:
            raise UsageError("--mixed auto is about the target's int8 file: add --precision int8")
        if self.precision not in self.precisions:
            raise UsageError(f"--precision {self.precision.value} is left out of --precisions; add it")
        if self.training.is_quantization_aware and Precision.INT8 not in self.precisions:
            raise UsageError("--qat is about int8 files: add int8 to --precisions")
        require_own_training(self.training, self.train, is_hooked=self.finetune_hook is not None)
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
        if not self.selects and self.selection != SelectionOptions():
            raise UsageError("--objective and limits of latency, size and memory are for --scheme auto")
        if self.selects and self.transfer != "anchored":
            raise UsageError(
                "--scheme auto weighs the damage that forms do after the anchored transfer; leave out --transfer, or "
                "name a --scheme"
            )
        if self.selects and self.max_drop_points is None and not self.selection.has_limit:
            object.__setattr__(self, "max_drop_points", DEFAULT_MAX_DROP)
        if self.calibration_images < 1 or self.threads < 1 or self.seed < 0 or not self.bench_seconds > 0:
            raise UsageError("--calibration-images, --threads and the bench time must be positive, --seed at least 0")

    @property
    def selects(self) -> bool:
        """Whether a form is chosen for every layer by measurement."""
        return self.scheme == AUTO and self.plan is None

    def is_target_file(self, file_format: Format, precision: Precision) -> bool:
        """Whether the promises are about the files of this kind."""
        return (file_format, precision) == (target_format(self.target), self.precision)

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
