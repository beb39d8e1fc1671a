"""`sepdeploy finetune`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click

from sepdeploy.cli.parameters import is_first_process, print_report, shown_progress
from sepdeploy.cli.train_options import train_options

__all__ = ["command"]


@click.command(short_help="Train the network of a finished bundle, and export and measure it again.")
@click.argument("bundle", type=click.Path(path_type=Path))
@train_options
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0, 2**63 - 1), metavar="N",
              help="Seed of the order of images and of their augmentation.")  # fmt: skip
@click.option("--model", type=click.Path(path_type=Path), help="Where the checkpoint is now, if it was moved.")
@click.option("--arch", metavar="SPEC", help="Where the architecture is now.")
@click.option("--calibration", metavar="PATH", help="Where the calibration images are now.")
@click.option("--validation", metavar="PATH", help="Where the validation images are now, or others.")
@click.option("--preprocess", metavar="FILE.toml", type=click.Path(path_type=Path), help="Where the preprocessing is "
              "now.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON instead of tables.")
def command(
    bundle: Path,
    train: str | None,
    finetune_hook: str | None,
    training: dict[str, Any],
    seed: int,
    model: Path | None,
    arch: str | None,
    calibration: str | None,
    validation: str | None,
    preprocess: Path | None,
    as_json: bool,
) -> int:
    """Fine-tune the network of BUNDLE, which 'sepdeploy convert' made; what is replaced stays as it is.

    \b
    Examples:
      sepdeploy finetune model.sepdeploy --train train_images/ --epochs 30
      sepdeploy finetune model.sepdeploy --train train_images/ --finetune-hook loop.py:train
      accelerate launch -m sepdeploy finetune model.sepdeploy --train train_images/ --epochs 90

    Training starts from the network before any training, or from what sepdeploy.adopt brought. With 'accelerate
    launch' it runs on all GPUs and machines, which must all see the bundle and the images; in several processes on
    CPUs with 'ACCELERATE_USE_CPU=true accelerate launch --multi_gpu'. Checkpoints and metrics are in
    BUNDLE/work/finetune; a run that was stopped goes on where it was when repeated. Exit codes as for convert.
    """
    from sepdeploy.core.options import MovedInputs
    from sepdeploy.core.training import TrainOptions

    is_first = is_first_process()
    options = TrainOptions(**training, seed=seed)
    with shown_progress(is_quiet=as_json or not is_first) as progress:
        from sepdeploy.pipeline import finetune  # torch: only when there is something to do
        from sepdeploy.stages.launch import LeaderFailedError, leave

        try:
            report = finetune(
                bundle,
                train,
                training=options,
                finetune=finetune_hook,
                moved=MovedInputs(model, arch, calibration, validation, preprocess),
                command=shlex.join(["sepdeploy", *click.get_current_context().obj]),
                progress=progress,
            )
        except LeaderFailedError as error:
            leave(error)
    if is_first:
        print_report(report, bundle, as_json=as_json)
    return 0 if report.is_success else 1
