"""`sepdeploy doctor`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from sepdeploy.cli.parameters import print_tables, shown_progress
from sepdeploy.errors import ToolError

if TYPE_CHECKING:
    from sepdeploy.core.readiness import Readiness

__all__ = ["command"]


@click.command(short_help="Say what each target needs here, and the commands that install what is missing.")
@click.argument("targets", metavar="[TARGET]...", nargs=-1)
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def command(targets: tuple[str, ...], as_json: bool) -> int:
    """Look for everything that TARGETs need (all kinds of targets if none is named) and say how to get what is missing.

    Boards are asked only if they are named. Packages are those of Debian and Ubuntu.

    \b
    Examples:
      sepdeploy doctor
      sepdeploy doctor cortex-a72 ssh://pi@raspberrypi.local

    \b
    Exit codes: 0 if every named TARGET can be used, or without names if ort and litert can, which convert makes and
    times files for by default; 4 if not.
    """
    from sepdeploy.planning.doctor import DEFAULT_TARGETS, DOCTORS, examine

    with shown_progress(is_quiet=as_json) as progress:
        found = []
        for name in dict.fromkeys(targets or DOCTORS):
            progress.stage(f"looking at {name}")
            found.append(examine(name))
    judged = targets or DEFAULT_TARGETS
    is_well = all(readiness.is_ready for readiness in found if readiness.target in judged)
    if as_json:
        import json

        data = {"judged_by": list(judged), "ok": is_well, "targets": [_as_data(each) for each in found]}
        click.echo(json.dumps(data, indent=1))
    else:
        _print(found, judged, is_well=is_well)
    return 0 if is_well else ToolError.exit_code


def _sudo() -> str:
    """What commands that install packages begin with."""
    import os

    return "" if not hasattr(os, "geteuid") or os.geteuid() == 0 else "sudo "


def _as_data(readiness: Readiness) -> dict[str, Any]:
    """As JSON has it."""
    return {
        "target": readiness.target,
        "summary": readiness.summary,
        "ready": readiness.is_ready,
        "needs": [
            {"name": need.name, "met": need.is_met, "found": need.found or None, "problem": need.problem or None}
            for need in readiness.needs
        ],
        "commands": list(readiness.commands(_sudo())),
    }


def _print(found: list[Readiness], judged: tuple[str, ...], *, is_well: bool) -> None:
    """A table of targets, then for each that is not ready what is wrong and what to run."""
    from sepdeploy.render.tables import NONE, Column, add_row, make_table

    table = make_table("Targets", (Column("target", "name"), Column("what it is", "name"), Column("ready")))
    for readiness in found:
        add_row(table, readiness.target, readiness.summary, "yes" if readiness.is_ready else "no")
    details = make_table("What they need", (Column("target", "name"), Column("needs", "name"), Column("found", "name")))
    for readiness in found:
        for need in readiness.needs:
            add_row(details, readiness.target, need.name, need.found if need.is_met else NONE)
    print_tables(table, details)
    for readiness in found:
        if readiness.is_ready:
            continue
        click.echo(f"{readiness.target}:")
        for need in readiness.needs:
            if not need.is_met:
                click.echo(f"  {need.problem}")
        for line in readiness.commands(_sudo()):
            click.echo(f"    {line}")
    verdict = "can be used" if is_well else "cannot all be used"
    click.echo(f"{', '.join(judged)} {verdict}")
