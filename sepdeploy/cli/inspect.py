"""`sepdeploy inspect`."""

from __future__ import annotations

from pathlib import Path

import click

from sepdeploy.cli.parameters import Shape, print_tables, shown_progress

__all__ = ["command"]


@click.command(short_help="List every convolution: its cost, and what it could become.")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--arch", required=True, metavar="SPEC", help="As for convert.")
@click.option("--input-shape", default="3,224,224", show_default=True, type=Shape(), help="Input of the network.")
@click.option("--terms", type=click.IntRange(min=1), default=2, show_default=True, metavar="T",
              help="Depthwise-separable pairs per convolution.")  # fmt: skip
@click.option("--rank-ratio", type=click.FloatRange(0, 1, min_open=True), default=0.25, show_default=True, metavar="R",
              help="Middle channels of a spatial pair, as a share of the full rank.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def command(
    model: Path, arch: str, input_shape: tuple[int, int, int], terms: int, rank_ratio: float, as_json: bool
) -> None:
    """List the convolutions of the network in the checkpoint MODEL, and what each could become.

    \b
    Example:
      sepdeploy inspect resnet20.pt --arch models.resnet_cifar:resnet20 --input-shape 3,32,32
    """
    from sepdeploy.core.plan import SchemeOptions

    with shown_progress(is_quiet=as_json) as progress:
        from sepdeploy.pipeline import inspect_model

        progress.stage("tracing the network")
        traced, candidates, notes = inspect_model(model, arch, input_shape, SchemeOptions(terms, rank_ratio))
    if as_json:
        import json

        from sepdeploy.core.codec import to_data

        data = {
            "trace": to_data(traced),
            "candidates": {
                site: {scheme: to_data(found) for scheme, found in of_site.items()}
                for site, of_site in candidates.items()
            },
            "notes": list(notes),
        }
        click.echo(json.dumps(data, indent=1))
        return
    from sepdeploy.render.terminal import inspect_table

    print_tables(inspect_table(traced, candidates))
    for note in notes:
        click.echo(f"note: {note}")
