"""The front of plans between the original network and the fastest one, as a table and as a picture."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sepdeploy.core.files import replacing
from sepdeploy.core.pareto import FrontPoint
from sepdeploy.errors import ContractError, UsageError
from sepdeploy.render.format_numbers import three_digits, times_text
from sepdeploy.render.tables import NONE, Column, add_row, make_table, mega

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.table import Table

__all__ = ["front_picture", "front_table", "require_picture"]

_SUFFIXES = (".png", ".svg")
_PREDICTED = "~"
"""Before a number that is a sum over the layers, so that no column mixes it with what was measured."""


def front_table(points: Sequence[FrontPoint]) -> Table:
    """Every plan with its latency, damage, accuracy, size and MACs; the one that was taken is marked.

    Raises:
        ContractError: if there are no points, or their latencies have different units.
    """
    columns = [
        Column("plan", "name"),
        Column(f"latency\n({_unit(points)})"),
        Column("speedup"),
        Column("damage"),
        Column("accuracy\n(%)"),
        Column("drop\n(points)"),
        Column("size\n(MB)"),
        Column("MACs\n(M)"),
    ]
    notes = {
        "* the plan that was taken": any(point.is_chosen for point in points),
        f"{_PREDICTED} predicted: the sum over the layers, the whole was not measured": any(
            point.is_predicted for point in points
        ),
    }
    table = make_table("Plans", columns, caption="\n".join(note for note, holds in notes.items() if holds) or None)
    for point in points:
        mark = _PREDICTED if point.is_predicted else ""
        add_row(
            table,
            f"{point.name} *" if point.is_chosen else point.name,
            f"{mark}{three_digits(point.latency)}",
            f"{mark}{times_text(point.speedup)}" if math.isfinite(point.speedup) else NONE,
            f"{mark}{three_digits(point.damage)}",
            NONE if point.accuracy_ratio is None else f"{100 * point.accuracy_ratio:.2f}",
            NONE if point.drop_points is None else f"{point.drop_points:.2f}",
            NONE if point.size_bytes is None else three_digits(point.size_bytes / 1e6),
            NONE if point.macs is None else mega(point.macs),
        )
    return table


def require_picture(path: Path) -> None:
    """Refuse a name that no picture can be written to, before anything that takes long.

    Raises:
        UsageError: if the suffix is not that of a PNG or SVG.
    """
    if path.suffix.lower() not in _SUFFIXES:
        raise UsageError(f"a picture is written as {' or '.join(_SUFFIXES)}, not as '{path.suffix}': {path}")


def front_picture(points: Sequence[FrontPoint], path: Path) -> None:
    """Draw latency against damage and, where at least two plans have it, against the measured drop.

    Predicted plans are hollow, measured ones filled, the original and the chosen one have marks of their own. Damage is
    linear below its smallest value above 0 and logarithmic from there on.

    Args:
        points: The plans.
        path: PNG or SVG, by its suffix.

    Raises:
        UsageError: if the suffix is another, or the file cannot be written.
        ContractError: if there are no points, or their latencies have different units.
    """
    require_picture(path)
    # By name, not through pyplot, which would look for a display and keep the figure.
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    unit = _unit(points)
    measured = [point for point in points if point.drop_points is not None]
    has_drops = len(measured) > 1
    # The salt and the missing date make equal plans equal files.
    with rc_context({"svg.hashsalt": "sepdeploy"}):
        figure = Figure(figsize=(7, 7.5 if has_drops else 4.5), layout="constrained")
        damage = figure.add_subplot(2 if has_drops else 1, 1, 1)
        _draw(damage, [(point, point.damage) for point in points])
        damage.set_ylabel("damage (change of the outputs)")
        positive = [point.damage for point in points if point.damage > 0]
        if positive:
            damage.set_yscale("symlog", linthresh=min(positive))
        damage.set_title("Plans between the original network and the fastest")
        lowest = damage
        if has_drops:
            lowest = figure.add_subplot(2, 1, 2, sharex=damage)
            _draw(lowest, [(point, point.drop_points) for point in measured if point.drop_points is not None])
            lowest.set_ylabel("measured drop (points)")
        lowest.set_xlabel(f"latency on the target ({unit})")
        _legend(figure, damage)
        _save(figure, path)


def _draw(axes: Axes, places: Sequence[tuple[FrontPoint, float]]) -> None:
    """One mark per plan at (latency, value), on a thin line in the order of latency."""
    ordered = sorted(places, key=lambda place: place[0].latency)
    axes.plot([point.latency for point, _ in ordered], [value for _, value in ordered], color="0.75", zorder=1)
    for point, value in ordered:
        label, marker, size = _style(point)
        axes.scatter(
            point.latency,
            value,
            s=size,
            marker=marker,
            facecolors="none" if point.is_predicted else _colour(point),
            edgecolors=_colour(point),
            label=label,
            zorder=3 if point.is_chosen else 2,
        )
    axes.grid(visible=True, alpha=0.3)


def _style(point: FrontPoint) -> tuple[str, str, float]:
    """What the legend says, the marker and its area in square points."""
    basis = "predicted" if point.is_predicted else "measured"
    if point.is_chosen:
        return f"chosen plan ({basis})", "*", 200.0
    if point.is_original:
        return f"original ({basis})", "s", 60.0
    return f"plan ({basis})", "o", 40.0


def _colour(point: FrontPoint) -> str:
    return "tab:red" if point.is_chosen else "black" if point.is_original else "tab:blue"


def _legend(figure: Figure, axes: Axes) -> None:
    """Each kind of mark once, below the axes."""
    kinds = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(kinds.values(), kinds.keys(), loc="outside lower center", ncols=2)


def _save(figure: Figure, path: Path) -> None:
    with replacing(path) as temporary:
        suffix = path.suffix.lower().removeprefix(".")
        figure.savefig(temporary, format=suffix, dpi=150, metadata={"Date": None} if suffix == "svg" else None)


def _unit(points: Sequence[FrontPoint]) -> str:
    units = {point.unit for point in points}
    if len(units) != 1:
        raise ContractError(f"latencies in {len(units)} units cannot be shown together: {', '.join(sorted(units))}")
    return units.pop()
