"""`sepdeploy targets`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from sepdeploy.cli.parameters import print_tables

if TYPE_CHECKING:
    from rich.table import Table

    from sepdeploy.core.price_cache import PriceCache

__all__ = ["command"]


@click.command(short_help="List the targets: what is installed, and how many prices are known.")
@click.option(
    "--forget", is_flag=True, help="Forget all prices, such as those of a machine that was busy, and all refusals."
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def command(forget: bool, as_json: bool) -> None:
    """List the targets that layers are priced on, how, and how many prices are remembered for this machine.

    Forms that the exporter or the runtime refuses are remembered too, and not tried again by this version.

    \b
    Example:
      sepdeploy targets
    """
    from sepdeploy.core.price_cache import PriceCache

    cache = PriceCache()
    if forget:
        cache.clear()
    targets = _targets(cache)
    if as_json:
        import json

        data = {"targets": targets, "cache": {"path": str(cache.path), "notes": cache.notes}}
        click.echo(json.dumps(data, indent=1))
        return
    print_tables(*_tables(targets))
    for target in targets:
        if target["missing"]:
            click.echo(f"{target['name']}: {', '.join(target['missing'])} not installed: {target['install']}")
    for note in cache.notes:
        click.echo(f"note: {note}")
    click.echo(f"prices: {cache.path}")


def _targets(cache: PriceCache) -> list[dict[str, Any]]:
    """What there is to say about each target, as JSON has it."""
    from dataclasses import asdict

    from sepdeploy.bench.environment import cpu_name
    from sepdeploy.planning.target import TARGETS_BY_NAME

    known = [asdict(row) for row in cache.summary() if row.cpu == cpu_name() or row.cpu.endswith(", emulated")]
    targets = []
    for name, find_kind in TARGETS_BY_NAME.items():
        kind = find_kind()
        targets.append(
            {
                "name": name,
                "summary": kind.summary,
                "format": kind.format.value,
                "method": kind.method.value,
                "unit": kind.unit,
                "missing": kind.missing,
                "install": kind.remedy or None,
                "cached": [
                    {key: row[key] for key in ("precision", "threads", "runtime", "prices", "refusals", "day")}
                    for row in known
                    if row["target"] == name
                ],
            }
        )
    return targets


def _tables(targets: list[dict[str, Any]]) -> list[Table]:
    """The targets, and where some are known the prices."""
    from sepdeploy.render.tables import Column, add_row, make_table

    columns = (Column("target", "name"), Column("what it is", "name"), Column("prices are", "name"))
    table = make_table("Targets", (*columns, Column("unit"), Column("installed")))
    known = make_table(
        "Prices known for this machine",
        (
            Column("target", "name"),
            *map(Column, ("precision", "threads", "runtime", "prices", "refused", "last measured")),
        ),
    )
    for target in targets:
        is_installed = "no" if target["missing"] else "yes"
        add_row(table, target["name"], target["summary"], target["method"], target["unit"], is_installed)
        for row in target["cached"]:
            add_row(known, target["name"], *map(str, row.values()))
    return [table, known] if known.row_count else [table]
