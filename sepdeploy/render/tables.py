"""Tables as this project prints them: names fold, numbers stay whole, nothing in a cell is markup."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from sepdeploy.render.format_numbers import printable, three_digits

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

__all__ = ["NONE", "Column", "add_row", "add_totals", "kilo", "make_table", "mega"]

NONE = "-"
"""A cell without a value."""


@dataclass(frozen=True, slots=True)
class Column:
    """A column: 'name' folds at any character, 'number' stays whole."""

    header: str
    kind: Literal["name", "number"] = "number"


def mega(count: int) -> str:
    """A count in millions."""
    return three_digits(count / 1e6)


def kilo(count: int) -> str:
    """A count in thousands."""
    return three_digits(count / 1e3)


def make_table(title: str, columns: Sequence[Column], *, caption: str | None = None) -> Table:
    """An empty table with a title above and a caption below."""
    from rich import box
    from rich.table import Table

    table = Table(
        title=_text(title, style="bold"),
        caption=None if caption is None else _text(caption),
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    for column in columns:
        table.add_column(
            _text(column.header),
            justify="left" if column.kind == "name" else "right",
            no_wrap=column.kind == "number",
            overflow="fold",
            min_width=8 if column.kind == "name" else None,
        )
    return table


def add_row(table: Table, name: str, *cells: str) -> None:
    """Add a row; all cells are shown as they are, control characters escaped."""
    table.add_row(_text(printable(name)), *(_text(cell) for cell in cells))


def add_totals(table: Table, *cells: str) -> None:
    """Add a last row in bold, set off by a line."""
    table.add_section()
    table.add_row(*(_text(cell) for cell in cells), style="bold")


def _text(text: str, style: str = "") -> Text:
    """Rich text without markup; line breaks are ours, everything else unprintable is escaped."""
    from rich.text import Text

    return Text("\n".join(printable(line) for line in text.split("\n")), style=style)
