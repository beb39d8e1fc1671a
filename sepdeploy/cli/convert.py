"""`sepdeploy convert`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any, Literal

import click

from sepdeploy.cli.int8_options import int8_options
from sepdeploy.cli.parameters import CommaList, Shape, TargetName, print_report, shown_progress
from sepdeploy.cli.scheme_options import scheme_options
from sepdeploy.cli.selection_options import selection_options
from sepdeploy.cli.train_options import train_options
from sepdeploy.core.options import AUTO, RECOVERED_BY_RECONSTRUCTION, RECOVERED_BY_TRAINING
from sepdeploy.core.plan import SchemeOptions
from sepdeploy.schemes.lowerings.lowering import LOWERINGS
from sepdeploy.schemes.scheme import SCHEMES

__all__ = ["command"]


@click.command(short_help="Convert a trained network into a smaller, faster one, with proof.")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--arch", required=True, metavar="SPEC", help="models.X:factory, file.py:factory, package.module:factory "
              "or timm:NAME; arguments as in factory(num_classes=10).")  # fmt: skip
@click.option("--calibration", required=True, metavar="PATH", help="Images (no labels needed): a folder, a folder of "
              "class folders, an .npz, or a manifest .toml.")  # fmt: skip
@click.option("--validation", metavar="PATH", help="Images that accuracy is measured on, best with labels; "
              "without it a quarter of the calibration images is held out.")  # fmt: skip
@click.option("--preprocess", metavar="FILE.toml", type=click.Path(path_type=Path),
              help="size, mean, std, color, layout; calibration/imagenet.toml is built in.")  # fmt: skip
@click.option("--input-shape", type=Shape(), help="Input of the network; default: the images' own size.")
@click.option("--scheme", default=AUTO, show_default=True, type=click.Choice((AUTO, *SCHEMES)),
              help="What convolutions become; auto measures every form of every layer on the target and takes the best "
              "mix.")  # fmt: skip
@click.option("--plan", type=click.Path(path_type=Path), metavar="FILE", help="Carry out this plan instead: the file "
              "of 'sepdeploy plan', edited or not, or another bundle's plan.json.")  # fmt: skip
@selection_options
@scheme_options(SchemeOptions())
@click.option("--linear", "includes_linear", is_flag=True, help="Replace nn.Linear layers too, as 1x1 convolutions, by "
              "the schemes that take those.")  # fmt: skip
@click.option("--max-drop", type=click.FloatRange(0, 100), metavar="POINTS", help="Most accuracy that may be lost; "
              "without it a given --scheme or --plan replaces all it can, whatever it costs.")  # fmt: skip
@click.option("--recoverable", type=click.FloatRange(0, 100), metavar="POINTS", help="How far beyond --max-drop the "
              "transfer may go because what follows wins it back (default "
              f"{RECOVERED_BY_RECONSTRUCTION:g} with reconstruction, {RECOVERED_BY_TRAINING:g} with training). Too "
              "much costs time, not the promise: the limit is tightened and everything after it is done again, up to "
              "two more trainings.")  # fmt: skip
@click.option("--target", default="ort", show_default=True, type=TargetName(),
              help="What the result must be faster on: a runtime on this CPU, an emulated Arm core (cortex-a72 runs "
              "LiteRT, cortex-a72:ort ONNX Runtime) by modelled cycles, or a board, ssh://USER@HOST[:PORT][:ort].",
              )  # fmt: skip
@click.option("--precision", default="float32", show_default=True, type=click.Choice(("float32", "int8")),
              help="Precision that the result must be faster and accurate in.")  # fmt: skip
@click.option("--mixed", default="none", show_default=True, type=click.Choice(("none", "auto")),
              help="auto: in the target's int8 file, layers stay in float or have int8 weights only, where int8 is "
              "slower on the target or --max-drop does not hold otherwise; for --precision int8.")  # fmt: skip
@click.option("--formats", default="onnx,tflite", show_default=True, type=CommaList(("onnx", "tflite")),
              help="Files to make, each in all --precisions.")  # fmt: skip
@click.option("--precisions", default="float32,int8", show_default=True, type=CommaList(("float32", "float16", "int8")),
              help="Precisions to make files in; float16 has float16 weights: half the size, and on most CPUs not "
              "faster.")  # fmt: skip
@click.option("--lowering", default="auto", show_default=True, type=CommaList(("auto", *LOWERINGS)),
              help="How separable forms are written down in the files: one or more, in order, of "
              f"{', '.join(LOWERINGS)}; auto takes what suits each format and precision.")  # fmt: skip
@int8_options
@click.option("--transfer", default="anchored", show_default=True, type=click.Choice(("anchored", "data-free")),
              help="How weights are found; data-free is for a named --scheme and leaves out all that follows but "
              "training.")  # fmt: skip
@click.option("--reconstruct/--no-reconstruct", default=None, help="Train each block for a few hundred steps to "
              "imitate the original's, on the calibration images without labels (default: yes).")  # fmt: skip
@train_options
@click.option("--calibration-images", default=512, show_default=True, type=click.IntRange(min=1), metavar="N",
              help="Most calibration images to use.")  # fmt: skip
@click.option("--threads", default=1, show_default=True, type=click.IntRange(min=1), help="Threads of the runtimes "
              "when latency is measured.")  # fmt: skip
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0, 2**63 - 1), metavar="N",
              help="Seed of the choice of images.")  # fmt: skip
@click.option("--output", type=click.Path(path_type=Path), metavar="DIR", help="The bundle; default: MODEL's name with "
              ".sepdeploy, in the working directory.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON instead of tables.")
def command(
    model: Path,
    arch: str,
    calibration: str,
    validation: str | None,
    preprocess: Path | None,
    input_shape: tuple[int, int, int] | None,
    scheme: str,
    plan: Path | None,
    selection: dict[str, Any],
    scheme_options: dict[str, Any],
    includes_linear: bool,
    max_drop: float | None,
    recoverable: float | None,
    target: str,
    precision: str,
    mixed: Literal["none", "auto"],
    formats: tuple[str, ...],
    precisions: tuple[str, ...],
    lowering: tuple[str, ...],
    int8: dict[str, Any],
    transfer: str,
    reconstruct: bool | None,
    train: str | None,
    finetune_hook: str | None,
    training: dict[str, Any],
    calibration_images: int,
    threads: int,
    seed: int,
    output: Path | None,
    as_json: bool,
) -> int:
    """Convert the network in the checkpoint MODEL and write a bundle: files, plan, report.

    \b
    Examples:
      sepdeploy convert resnet20.pt --arch models.resnet_cifar:resnet20 --calibration train/ \\
          --validation test/ --preprocess calibration/cifar10.toml --max-drop 2
      sepdeploy convert resnet20.pt --arch models.resnet_cifar:resnet20 --calibration train/ \\
          --validation test/ --preprocess calibration/cifar10.toml --train train/ --epochs 10

    The exit code is 0 if the converted network is faster than the original on the target and holds --max-drop and the
    other limits, 1 if the bundle was written but a promise is broken. Where less memory, size, MACs or parameters are
    asked for, being slower is no failure. A run that was stopped goes on where it was when repeated.
    """
    from sepdeploy.core.artifact import Format, Precision
    from sepdeploy.core.int8 import Int8Options
    from sepdeploy.core.options import ConvertOptions, SelectionOptions
    from sepdeploy.core.training import ReconstructOptions, TrainOptions

    if "auto" in lowering and len(lowering) > 1:
        raise click.UsageError("--lowering auto stands alone: it takes what suits each file")
    if reconstruct and transfer == "data-free":
        raise click.UsageError("--reconstruct needs images, and --transfer data-free uses none: leave out one of them")
    options = ConvertOptions(
        model=model,
        arch=arch,
        calibration=calibration,
        validation=validation,
        preprocess=preprocess,
        input_shape=input_shape,
        scheme=scheme,
        scheme_options=_scheme_options(scheme, plan, scheme_options),
        plan=plan,
        selection=SelectionOptions(**selection),
        includes_linear=includes_linear,
        max_drop_points=max_drop,
        recoverable_points=recoverable,
        target=target,
        precision=Precision(precision),
        mixed=mixed,
        formats=tuple(Format(name) for name in formats),
        precisions=tuple(precision for precision in Precision if precision.value in precisions),
        lowering=None if lowering == ("auto",) else lowering,
        int8=Int8Options(**int8),
        transfer=transfer,
        reconstruct=None if reconstruct is False else ReconstructOptions(seed=seed),
        train=train,
        training=TrainOptions(**training, seed=seed),
        finetune_hook=finetune_hook,
        calibration_images=calibration_images,
        threads=threads,
        seed=seed,
        output=output,
        command=shlex.join(["sepdeploy", *click.get_current_context().obj]),
    )
    with shown_progress(is_quiet=as_json) as progress:
        from sepdeploy.pipeline import convert  # torch: only when there is something to do

        report = convert(options, progress)
    print_report(report, options.output_folder, as_json=as_json)
    return 0 if report.is_success else 1


def _scheme_options(scheme: str, plan: Path | None, given: dict[str, Any]) -> SchemeOptions:
    """The hyper-parameters of a scheme; a selection and a plan have their own."""
    from sepdeploy.schemes.read_options import read_options

    if scheme != AUTO and plan is not None:
        raise click.UsageError("--plan says what every layer becomes: leave out --scheme")
    if scheme != AUTO:
        return read_options([scheme], given, SchemeOptions())
    if given:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise click.UsageError(f"{names} belongs to a --scheme, and a selection or a plan chooses it: name a --scheme")
    return SchemeOptions()
