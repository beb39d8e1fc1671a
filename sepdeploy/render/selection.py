"""What a selection weighed and chose, as tables and sentences."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sepdeploy.core.measurement import Method
from sepdeploy.core.selection import Choice, LayerChoices, Selection
from sepdeploy.render.format_numbers import plural, three_digits
from sepdeploy.render.tables import NONE, Column, add_row, add_totals, kilo, make_table, mega

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["explanation", "selection_table"]


def selection_table(selection: Selection) -> Table:
    """One row per layer: what it becomes, what that saves and what damage it does."""
    columns = [
        Column("layer", "name"),
        Column("becomes", "name"),
        Column(f"{selection.unit}\nsaved"),
        Column("damage"),
        Column("MMACs\nbefore"),
        Column("after"),
        Column("weighed"),
    ]
    where = f"{selection.target} {selection.precision.value}, {plural(selection.threads, 'thread')}"
    table = make_table(
        f"Plan for {where}", columns, caption="damage: change of the outputs with this layer alone replaced"
    )
    chosen = selection.choices
    for layer in selection.layers:
        choice = chosen[layer.name]
        add_row(
            table,
            layer.name,
            _name(choice),
            _signed(-choice.difference) if choice.candidate else NONE,
            three_digits(choice.damage) if choice.candidate else NONE,
            mega(layer.choices[0].macs),
            mega(choice.macs),
            str(len(layer.choices) - 1),
        )
    before, after = three_digits(selection.original_cost), three_digits(selection.predicted_cost)
    add_totals(
        table,
        f"{sum(choice.candidate is not None for choice in chosen.values())} of {len(chosen)} replaced",
        f"predicted: {before} -> {after} {selection.unit}",
        _signed(selection.original_cost - selection.predicted_cost),
        three_digits(sum(choice.damage for choice in chosen.values())),
        mega(sum(layer.choices[0].macs for layer in selection.layers)),
        mega(sum(choice.macs for choice in chosen.values())),
        str(sum(len(layer.choices) - 1 for layer in selection.layers)),
    )
    return table


def explanation(selection: Selection, name: str) -> tuple[Table, str]:
    """All that was weighed for one layer, and why it became what it is.

    Raises:
        UsageError: if the selection has no layer of that name.
    """
    layer = selection.layer(name)
    chosen = selection.choices[name]
    columns = [
        Column("form", "name"),
        Column("written as", "name"),
        Column(f"{selection.unit}\nsaved"),
        Column("95% interval" if selection.method is Method.WALL_CLOCK else "range of\nthe model"),
        Column("damage"),
        Column("kMACs"),
        Column("k params"),
    ]
    table = make_table(f"{name} on {selection.target} {selection.precision.value}", columns)
    for choice in sorted(layer.choices, key=lambda each: (each.damage, -each.difference)):
        add_row(
            table,
            ("* " if choice is chosen else "") + _name(choice),
            ", ".join(choice.lowering) or NONE,
            _signed(-choice.difference),
            f"{_signed(-choice.difference_high)} to {_signed(-choice.difference_low)}",
            three_digits(choice.damage),
            kilo(choice.macs),
            kilo(choice.params),
        )
    for label, reason in layer.refused.items():
        add_row(table, label, reason, *[NONE] * 5)
    return table, _why(selection, layer, chosen)


def _why(selection: Selection, layer: LayerChoices, chosen: Choice) -> str:
    if layer.kept is not None:
        detail = f" ({layer.kept.detail})" if layer.kept.detail else ""
        return f"{layer.name} stays as it is: {layer.kept.reason.value}{detail}"
    if chosen.candidate is None and layer.name in selection.taken_back:
        return f"{layer.name} stays as it is: {selection.taken_back[layer.name]}"
    unit = selection.unit
    faster = [
        choice
        for choice in layer.choices
        if choice.difference < chosen.difference and (choice.difference_high < 0 or selection.takes_slower_forms)
    ]
    milder = [choice for choice in layer.choices if choice.damage < chosen.damage]
    if chosen.candidate is None:
        sentence = f"{layer.name} stays as it is"
        if len(layer.choices) == 1:
            return f"{sentence}: no other form of it could be measured on the target"
        if not selection.takes_slower_forms and not any(choice.difference_high < 0 for choice in layer.choices):
            forms = plural(len(layer.choices) - 1, "form")
            ends = _range_name(selection)
            return f"{sentence}: none of {forms} measured is faster on the target by the whole of its {ends}"
    else:
        saved = three_digits(-chosen.difference)
        sentence = (
            f"{layer.name} becomes {chosen.label}: saves {saved} {unit} for a damage of {three_digits(chosen.damage)}"
        )
    if faster:
        next_one = min(faster, key=lambda c: (c.damage - chosen.damage) / (chosen.difference - c.difference))
        gain, harm = chosen.difference - next_one.difference, next_one.damage - chosen.damage
        if harm > 0:
            sentence += (
                f"; {next_one.label} would save {three_digits(gain)} {unit} more for {three_digits(harm)} more damage, "
                "which the other layers buy cheaper, or the limit does not allow"
            )
    if milder and chosen.candidate is not None:
        next_one = min(milder, key=lambda c: (c.difference - chosen.difference) / (chosen.damage - c.damage))
        cost, relief = next_one.difference - chosen.difference, chosen.damage - next_one.damage
        if cost > 0:
            sentence += (
                f"; {next_one.label} would do {three_digits(relief)} less damage for {three_digits(cost)} {unit} more"
            )
    return sentence


def _range_name(selection: Selection) -> str:
    return "interval" if selection.method is Method.WALL_CLOCK else "modelled range"


def _name(choice: Choice) -> str:
    return "as it is" if choice.candidate is None else choice.label


def _signed(value: float) -> str:
    return three_digits(value) if value >= 0 else f"-{three_digits(-value)}"
