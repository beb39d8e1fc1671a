"""Tables about schemes and the networks designed with them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from sepdeploy.core.design import DesignResult, SchemeCost
from sepdeploy.render.format_numbers import times_text
from sepdeploy.render.tables import NONE, Column, add_row, kilo, make_table, mega

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["complexity_table", "designs_table", "schemes_table"]


def schemes_table(rows: Sequence[SchemeCost]) -> Table:
    """What there is: each scheme once, with its options."""
    columns = [Column("scheme", "name"), Column("prefix"), Column("what it is", "name"), Column("options", "name")]
    table = make_table("Schemes", columns)
    by_summary: dict[str, SchemeCost] = {}
    for row in rows:
        by_summary.setdefault(row.summary, row)
    for row in by_summary.values():
        options = ", ".join(f"--{name.replace('_', '-')}" for name in row.option_names)
        add_row(table, row.name, row.prefix or NONE, row.summary, options or NONE)
    return table


def complexity_table(rows: Sequence[SchemeCost], channels: int, kernel_size: int, input_size: int) -> Table:
    """What each scheme makes of one convolution: weights, MACs and receptive field."""
    columns = [
        Column("scheme", "name"),
        Column("weights\n(formula)"),
        Column("weights\n(k)"),
        Column("MACs\n(M)"),
        Column("weights\nratio"),
        Column("sees\nall"),
        Column("convolutions", "name"),
    ]
    title = f"{channels} to {channels} channels, {kernel_size}x{kernel_size}, {input_size}x{input_size} pixels"
    caption = (
        "C: channels, K: kernel, T: pairs (1), r: middle channels, g: groups. MACs are the weights times the pixels.\n"
        "sees all: whether every output sees every input channel in the whole window (volumetric receptive field)."
    )
    table = make_table(title, columns, caption=caption)
    for row in rows:
        if row.refusal is not None or row.params is None or row.macs is None or row.ratio is None:
            reason = row.refusal.value if row.refusal else ""
            add_row(table, row.name, row.complexity, NONE, NONE, NONE, NONE, reason)
            continue
        sees = "yes" if row.keeps_receptive_field else "no"
        cells = (kilo(row.params), mega(row.macs), times_text(row.ratio), sees, row.form or "")
        add_row(table, row.name, row.complexity, *cells)
    return table


def designs_table(results: Sequence[DesignResult]) -> Table:
    """The original network and its variants: channel multiplier, cost, and whether the receptive field is kept."""
    columns = [
        Column("network", "name"),
        Column("multiplier"),
        Column("params\n(M)"),
        Column("ratio"),
        Column("MACs\n(M)"),
        Column("ratio"),
        Column("replaced"),
        Column("sees\nall"),
    ]
    first = results[0]
    title = f"Designed for input {','.join(map(str, first.input_shape))}"
    caption = "sees all: whether every replaced convolution keeps the dense one's volumetric receptive field."
    table = make_table(title, columns, caption=caption)
    original = first.original
    one = times_text(1.0)
    add_row(table, "original", "1", mega(original.params), one, mega(original.macs), one, NONE, "yes")
    for result in results:
        cost = result.variant
        add_row(
            table,
            result.name,
            f"{result.multiplier:g}",
            mega(cost.params),
            times_text(cost.params / result.original.params),
            mega(cost.macs),
            times_text(cost.macs / result.original.macs),
            f"{result.replaced} of {cost.convs}",
            "yes" if result.keeps_receptive_field else "no",
        )
    return table
