"""Parameter types and output that the commands share."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console, RenderableType

    from sepdeploy.core.progress import Progress
    from sepdeploy.core.report import Report

__all__ = [
    "Bytes",
    "CommaList",
    "Shape",
    "TargetName",
    "is_first_process",
    "print_report",
    "print_tables",
    "shown_progress",
]


class Shape(click.ParamType):  # type: ignore[type-arg]
    """C,H,W as three positive integers."""

    name = "C,H,W"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int, int]:
        """Parse '3,224,224'."""
        if isinstance(value, tuple):
            return value
        try:
            channels, height, width = (int(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is not C,H,W, such as 3,224,224", param, ctx)
        if min(channels, height, width) < 1:
            self.fail(f"{value!r} has a size below 1", param, ctx)
        return channels, height, width


class Bytes(click.ParamType):  # type: ignore[type-arg]
    """A size with an optional unit: 300000, 300kB, 256KiB, 2MB."""

    name = "BYTES"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """Parse '256KiB'."""
        found = re.fullmatch(r"\s*([0-9.]+)\s*([kKmMgG]?)(i?)[bB]?\s*", str(value))
        try:
            number = float(found[1]) if found else 0.0
        except ValueError:
            number = 0.0
        if found is None or number <= 0:
            self.fail(f"{value!r} is not a size above 0, such as 300kB, 256KiB or 2MB", param, ctx)
        return max(1, int(number * (1024 if found[3] else 1000) ** " KMG".index(found[2].upper() or " ")))


class TargetName(click.ParamType):  # type: ignore[type-arg]
    """A target by name, or a board by its address."""

    name = "TARGET"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """Check 'ssh://pi@board'."""
        from sepdeploy.core.options import target_format
        from sepdeploy.errors import UsageError

        try:
            target_format(str(value))
        except UsageError as error:
            self.fail(str(error), param, ctx)
        return str(value)


class CommaList(click.ParamType):  # type: ignore[type-arg]
    """Names from a fixed choice, separated by commas."""

    name = "NAME,NAME"

    def __init__(self, choices: tuple[str, ...]) -> None:
        self._choices = choices

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, ...]:
        """Parse 'onnx,tflite'; repeated names count once."""
        if isinstance(value, tuple):
            return value
        names = tuple(dict.fromkeys(part.strip() for part in str(value).split(",") if part.strip()))
        wrong = [name for name in names if name not in self._choices]
        if wrong or not names:
            self.fail(f"{value!r} is not a list of {', '.join(self._choices)}", param, ctx)
        return names


@contextmanager
def shown_progress(*, is_quiet: bool) -> Iterator[Progress]:
    """Progress on standard error while it is a terminal; nothing otherwise."""
    from sepdeploy.core.progress import Silent

    if is_quiet or not sys.stderr.isatty():
        yield Silent()
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("starting", total=None)

        class Shown:
            def stage(self, text: str) -> None:
                bar.reset(task, total=None, description=text)

            def step(self, done: int, total: int) -> None:
                bar.update(task, completed=done, total=total)

        yield Shown()


def is_first_process() -> bool:
    """Whether this is the only process, or the first that a launcher started: the one that speaks and writes."""
    return int(os.environ.get("RANK", "0")) == 0


def print_tables(*renderables: RenderableType) -> None:
    """Print to standard output, as wide as the terminal, 100 columns where there is none."""
    console = _console()
    for renderable in renderables:
        console.print(renderable)


def print_report(report: Report, bundle: Path, *, as_json: bool) -> None:
    """Print what a run came to, as tables with notes and a verdict, or all of it as JSON."""
    if as_json:
        from sepdeploy.core.codec import to_json

        click.echo(to_json(report), nl=False)
        return
    from sepdeploy.render.format_numbers import printable
    from sepdeploy.render.int8 import int8_results, int8_table
    from sepdeploy.render.summary import selection_sentence, verdict
    from sepdeploy.render.terminal import artifacts_table, cycles_table, recovery_table, summary_table

    recovery = (recovery_table(report),) if report.recovery else ()
    counts = {result.artifact.path: result.counts for result in report.artifacts if result.counts}
    counted = (cycles_table(counts),) if counts else ()
    int8 = (int8_table(report),) if int8_results(report) else ()
    print_tables(*recovery, summary_table(report), artifacts_table(report), *counted, *int8)
    if sentence := selection_sentence(report):
        click.echo(sentence)
    for note in report.notes:
        click.echo(f"note: {printable(note)}")
    click.echo(verdict(report))
    click.echo(f"report: {bundle / 'report.html'}")


def _console() -> Console:
    from rich.console import Console

    is_terminal = sys.stdout.isatty()
    return Console(width=None if is_terminal else 100, highlight=False, soft_wrap=False)
