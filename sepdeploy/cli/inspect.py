"""`sepdeploy inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from sepdeploy.cli.parameters import CommaList, Shape, print_tables, shown_progress
from sepdeploy.cli.scheme_options import scheme_options
from sepdeploy.core.plan import SchemeOptions
from sepdeploy.schemes.scheme import SCHEMES, find_scheme

__all__ = ["command"]

_SCHEMES = tuple(name for name in SCHEMES if name != "dense")
_SHOWN = ("depthwise_separable", "spatial_separable", "low_rank", "optimized_separable")
"""As many columns as a terminal of 100 characters has room for."""


@click.command(short_help="List every convolution: its cost, and what it could become.")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--arch", required=True, metavar="SPEC", help="As for convert.")
@click.option("--input-shape", default="3,224,224", show_default=True, type=Shape(), help="Input of the network.")
@click.option("--scheme", "schemes", default=",".join(_SHOWN), show_default=True, type=CommaList(_SCHEMES),
              help=f"Columns of the table: one or more of {', '.join(_SCHEMES)}.")  # fmt: skip
@scheme_options(SchemeOptions())
@click.option("--linear", "includes_linear", is_flag=True, help="List linear layers too, as 1x1 convolutions.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def command(
    model: Path,
    arch: str,
    input_shape: tuple[int, int, int],
    schemes: tuple[str, ...],
    scheme_options: dict[str, Any],
    includes_linear: bool,
    as_json: bool,
) -> None:
    """List the convolutions of the network in the checkpoint MODEL, and what each could become.

    \b
    Example:
      sepdeploy inspect resnet20.pt --arch models.resnet_cifar:resnet20 --input-shape 3,32,32
    """
    from sepdeploy.schemes.read_options import read_options

    options = read_options(schemes, scheme_options, SchemeOptions())
    with shown_progress(is_quiet=as_json) as progress:
        from sepdeploy.pipeline import inspect_model

        progress.stage("tracing the network")
        found = inspect_model(model, arch, input_shape, schemes, options, includes_linear=includes_linear)
    if as_json:
        import json

        from sepdeploy.core.codec import to_data
        from sepdeploy.render.memory import memory_data

        data = {
            "trace": to_data(found.trace),
            "candidates": {
                site: {scheme: to_data(offer) for scheme, offer in of_site.items()}
                for site, of_site in found.candidates.items()
            },
            "memory": memory_data(found),
            "notes": list(found.notes),
        }
        click.echo(json.dumps(data, indent=1))
        return
    from sepdeploy.render.memory import memory_table
    from sepdeploy.render.terminal import inspect_table

    headings = {name: find_scheme(name).prefix for name in schemes}
    print_tables(inspect_table(found.trace, found.candidates, headings), memory_table(found, headings))
    for note in found.notes:
        click.echo(f"note: {note}")
