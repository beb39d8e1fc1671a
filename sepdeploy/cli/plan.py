"""`sepdeploy plan`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click

from sepdeploy.cli.parameters import Shape, TargetName, is_first_process, print_tables, shown_progress
from sepdeploy.cli.selection_options import selection_options

__all__ = ["command"]

_FRONT_POINTS = 8


@click.command(short_help="Weigh every form of every layer on the target; say what is best and why.")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--arch", metavar="SPEC", help="models.X:factory, file.py:factory, package.module:factory or timm:NAME.")
@click.option(
    "--calibration", metavar="PATH", help="Images (no labels needed): a folder, an .npz, or a manifest .toml."
)
@click.option("--validation", metavar="PATH", help="Images that accuracy is measured on, best with labels; without it "
              "a quarter of the calibration images is held out.")  # fmt: skip
@click.option("--preprocess", metavar="FILE.toml", type=click.Path(path_type=Path),
              help="size, mean, std, color, layout; calibration/imagenet.toml is built in.")  # fmt: skip
@click.option("--input-shape", type=Shape(), help="Input of the network; default: the images' own size.")
@selection_options
@click.option("--linear", "includes_linear", is_flag=True, help="Weigh nn.Linear layers too.")
@click.option("--max-drop", type=click.FloatRange(0, 100), metavar="POINTS", help="Most accuracy that may be lost.")
@click.option("--recoverable", type=click.FloatRange(0, 100), metavar="POINTS", help="How far beyond --max-drop the "
              "plan may go because training wins it back; default 3, as 'convert' has it.")  # fmt: skip
@click.option("--target", default="ort", show_default=True, type=TargetName(),
              help="What forms are measured on: a runtime on this CPU, an emulated Arm core, both of which 'sepdeploy "
              "targets' lists, or a board, ssh://USER@HOST[:PORT][:ort].")  # fmt: skip
@click.option("--precision", default="float32", show_default=True, type=click.Choice(("float32", "int8")),
              help="Precision that they are measured in.")  # fmt: skip
@click.option("--threads", default=1, show_default=True, type=click.IntRange(min=1), help="Threads of the runtime.")
@click.option("--calibration-images", default=512, show_default=True, type=click.IntRange(min=1), metavar="N",
              help="Most calibration images to use.")  # fmt: skip
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0, 2**63 - 1), metavar="N",
              help="Seed of the choice of images.")  # fmt: skip
@click.option("--output", type=click.Path(path_type=Path), metavar="DIR", help="Where plan.json goes; default: MODEL's "
              "name with .plan, in the working directory.")  # fmt: skip
@click.option("--pareto", type=click.Path(path_type=Path), metavar="FILE.png", help="Carry out and measure plans "
              "between the original and the fastest: a table, and this picture (.png or .svg).")  # fmt: skip
@click.option("--explain", metavar="LAYER", help="Only say why this layer became what it is, from a plan that is "
              "there: MODEL is then its folder or plan.json.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON instead of tables.")
def command(
    model: Path,
    arch: str | None,
    calibration: str | None,
    max_drop: float | None,
    recoverable: float | None,
    precision: str,
    selection: dict[str, Any],
    output: Path | None,
    pareto: Path | None,
    explain: str | None,
    as_json: bool,
    **options: Any,
) -> int:
    """Find the best form for every layer of the checkpoint MODEL, and write plan.json with all that was weighed.

    \b
    Examples:
      sepdeploy plan resnet20.pt --arch models.resnet_cifar:resnet20 --calibration train/ \\
          --validation test/ --preprocess calibration/cifar10.toml --max-drop 1 --pareto front.png
      sepdeploy plan resnet20.plan --explain layer1.0.conv1
      sepdeploy convert resnet20.pt ... --plan resnet20.plan/plan.json

    To decide otherwise, change what plan.json has under "chosen" and give it to 'sepdeploy convert --plan'.
    """
    from sepdeploy.core.codec import read_json, to_json
    from sepdeploy.core.selection import Selection
    from sepdeploy.render.selection import explanation, selection_table

    if explain is not None:
        path = model / "plan.json" if model.is_dir() else model
        weighed = read_json(Selection, path)
        if as_json:
            click.echo(to_json(weighed.layer(explain)), nl=False)
            return 0
        table, sentence = explanation(weighed, explain)
        print_tables(table)
        click.echo(sentence)
        return 0
    if arch is None or calibration is None:
        missing = " and ".join(name for name, value in (("--arch", arch), ("--calibration", calibration)) if not value)
        raise click.UsageError(f"give {missing}, or --explain LAYER with a plan that is there")
    from sepdeploy.core.artifact import Precision
    from sepdeploy.core.options import ConvertOptions, SelectionOptions

    if pareto is not None:
        from sepdeploy.render.pareto import require_picture

        require_picture(pareto)

    converting = ConvertOptions(
        model=model,
        arch=arch,
        calibration=calibration,
        max_drop_points=max_drop,
        recoverable_points=recoverable,
        precision=Precision(precision),
        selection=SelectionOptions(**selection),
        command=shlex.join(["sepdeploy", *click.get_current_context().obj]),
        **options,
    )
    folder = output or Path(f"{model.stem}.plan")
    is_first = is_first_process()
    with shown_progress(is_quiet=as_json or not is_first) as progress:
        from sepdeploy.pipeline import plan  # torch: only when there is something to do
        from sepdeploy.stages.launch import LeaderFailedError, leave

        try:
            weighed, front = plan(converting, folder, front_points=_FRONT_POINTS if pareto else 0, progress=progress)
        except LeaderFailedError as error:
            leave(error)
    if not is_first:
        return 0
    if pareto is not None:
        from sepdeploy.render.pareto import front_picture, front_table

        front_picture(front, pareto)
    if as_json:
        click.echo(to_json(weighed), nl=False)
        return 0
    print_tables(selection_table(weighed))
    if pareto is not None:
        print_tables(front_table(front))
        click.echo(f"picture: {pareto}")
    for note in weighed.notes:
        click.echo(f"note: {note}")
    click.echo(f"plan: {folder / 'plan.json'}")
    return 0
