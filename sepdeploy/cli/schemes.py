"""`sepdeploy schemes`."""

from __future__ import annotations

import click

from sepdeploy.cli.parameters import print_tables

__all__ = ["command"]


@click.command(short_help="List the schemes, and what each costs for one convolution.")
@click.option("--channels", default=64, show_default=True, type=click.IntRange(1, 4096), metavar="C",
              help="Input and output channels of the convolution.")  # fmt: skip
@click.option(
    "--kernel-size", default=3, show_default=True, type=click.IntRange(1, 63), metavar="K", help="Its kernel."
)
@click.option("--input-size", default=32, show_default=True, type=click.IntRange(min=1), metavar="PIXELS",
              help="Height and width of its input.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")
def command(channels: int, kernel_size: int, input_size: int, as_json: bool) -> None:
    """List the schemes with their options, and the complexity of each for a convolution of C to C channels.

    \b
    Example:
      sepdeploy schemes --channels 256 --input-size 14
    """
    from sepdeploy.schemes.complexity import scheme_costs

    rows = scheme_costs(channels, kernel_size, input_size)
    if as_json:
        import json

        from sepdeploy.core.codec import to_data

        click.echo(json.dumps([to_data(row) for row in rows], indent=1))
        return
    from sepdeploy.render.designs import complexity_table, schemes_table

    print_tables(schemes_table(rows), complexity_table(rows, channels, kernel_size, input_size))
