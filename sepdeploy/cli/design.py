"""`sepdeploy design`."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import click
from click.core import ParameterSource

from sepdeploy.cli.parameters import CommaList, Shape, print_tables, shown_progress
from sepdeploy.cli.scheme_options import scheme_options
from sepdeploy.core.design import ACTIVATIONS, FROM_SCRATCH, DesignOptions, DesignResult, Match, Middle
from sepdeploy.core.progress import Progress
from sepdeploy.errors import UsageError
from sepdeploy.schemes.scheme import SCHEMES

__all__ = ["command"]

_SCHEMES = tuple(name for name in SCHEMES if name != "dense")


@click.command(short_help="Build separable variants of a network, to be trained from scratch.")
@click.option("--arch", required=True, metavar="SPEC", help="As for convert; its factory needs an argument such as "
              "width that scales the channels.")  # fmt: skip
@click.option("--input-shape", default="3,224,224", show_default=True, type=Shape(), help="Input of the network.")
@click.option("--scheme", "schemes", default="optimized_separable", show_default=True,
              type=CommaList(("all", *_SCHEMES)), help=f"One or more of {', '.join(_SCHEMES)}, or all.")  # fmt: skip
@scheme_options(FROM_SCRATCH)
@click.option("--match", default="both", show_default=True, type=click.Choice(get_args(Match)),
              help="Cost of the original that the channel multiplier matches; both: the widest network that exceeds "
              "neither by more than 1%.")  # fmt: skip
@click.option("--multiplier", type=click.FloatRange(0, 64, min_open=True), metavar="M", help="The channel multiplier "
              "itself, instead of --match.")  # fmt: skip
@click.option("--step", default=0.125, show_default=True, type=click.FloatRange(0, 64, min_open=True),
              help="Multipliers that --match tries are multiples of this.")  # fmt: skip
@click.option("--width-argument", metavar="NAME", help="Argument of the factory that scales the channels; default: "
              "width, width_mult, channel_multiplier or multiplier.")  # fmt: skip
@click.option("--middle", default="linear", show_default=True, type=click.Choice(get_args(Middle)),
              help="What follows each convolution of a chain but the last: nothing, a batch norm, or both a batch norm "
              "and an activation.")  # fmt: skip
@click.option("--activation", default="relu", show_default=True, type=click.Choice(ACTIVATIONS), help="The activation "
              "of --middle norm_activation.")  # fmt: skip
@click.option("--replace-pointwise", is_flag=True, help="Replace 1x1 convolutions too.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0, 2**63 - 1), metavar="N",
              help="Seed of the fresh weights.")  # fmt: skip
@click.option("--output", type=click.Path(path_type=Path), metavar="DIR", help="Write a bundle that sepdeploy.load "
              "gives back as an nn.Module to train; for one scheme.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def command(
    arch: str,
    input_shape: tuple[int, int, int],
    schemes: tuple[str, ...],
    scheme_options: dict[str, Any],
    match: Match,
    multiplier: float | None,
    step: float,
    width_argument: str | None,
    middle: Middle,
    activation: Any,
    replace_pointwise: bool,
    seed: int,
    output: Path | None,
    as_json: bool,
) -> None:
    """Replace every convolution by the form that a scheme designs for it, and scale the channels to the same cost.

    \b
    Example:
      sepdeploy design --arch models.resnet_cifar:resnet20 --input-shape 3,32,32 \\
          --scheme optimized_separable --match macs --output o-resnet20
    """
    from sepdeploy.schemes.read_options import read_options

    names = _SCHEMES if "all" in schemes else schemes
    if output is not None and len(names) > 1:
        raise click.UsageError("--output takes one variant: name one --scheme")
    _require_consistent(middle)
    options = DesignOptions(
        arch=arch,
        input_shape=input_shape,
        scheme=names[0],
        scheme_options=read_options(names, scheme_options, FROM_SCRATCH),
        match=match,
        multiplier=multiplier,
        step=step,
        width_argument=width_argument,
        middle=middle,
        activation=activation,
        replaces_pointwise=replace_pointwise,
        seed=seed,
        output=output,
        command=shlex.join(["sepdeploy", *click.get_current_context().obj]),
    )
    with shown_progress(is_quiet=as_json) as progress:
        results, refusals = _designs(options, names, progress)
    from sepdeploy.render.format_numbers import printable

    if as_json:
        import json

        from sepdeploy.core.codec import to_data

        click.echo(json.dumps([to_data(result) for result in results], indent=1))
    else:
        from sepdeploy.render.designs import designs_table

        print_tables(designs_table(results))
    for refusal in refusals:
        click.echo(f"note: {printable(str(refusal))}", err=as_json)
    if output is not None and not as_json:
        click.echo(f"bundle: {output}")


def _require_consistent(middle: Middle) -> None:
    """Refuse options that another one leaves without effect."""
    context = click.get_current_context()
    given = {name for name in context.params if context.get_parameter_source(name) is not ParameterSource.DEFAULT}
    for name in ("match", "step"):
        if {"multiplier", name} <= given:
            raise click.UsageError(f"--multiplier leaves nothing to search for: leave out --{name}")
    if "activation" in given and middle != "norm_activation":
        raise click.UsageError("--activation is that of --middle norm_activation: give both or neither")


def _designs(
    options: DesignOptions, names: tuple[str, ...], progress: Progress
) -> tuple[list[DesignResult], list[UsageError]]:
    """The variants, and why those that are missing have none; an error only if that are all."""
    from sepdeploy.pipeline import design  # torch: only when there is something to do

    results, refusals = [], []
    for name in names:
        try:
            results.append(design(replace(options, scheme=name), progress)[1])
        except UsageError as error:
            refusals.append(error)
    if not results:
        raise refusals[0]
    return results, refusals
