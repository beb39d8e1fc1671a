"""The table of activation memory: what each layer keeps alive while it runs, dense and separable."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from sepdeploy.core.artifact import Precision
from sepdeploy.core.inspection import Inspection
from sepdeploy.core.memory import MemoryProfile
from sepdeploy.core.plan import Candidate
from sepdeploy.render.format_numbers import times_text
from sepdeploy.render.tables import NONE, Column, add_row, add_totals, kilo, make_table

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["memory_data", "memory_table"]


def memory_table(inspection: Inspection, headings: Mapping[str, str]) -> Table:
    """Peak bytes of activations alive while each layer runs, and the ratio with each scheme's form in its place.

    Args:
        inspection: The network; layers that no scheme can replace are left out.
        headings: Scheme name -> heading of its column; its name where there is none.
    """
    schemes = list(inspection.memory_with)
    shown = [headings.get(scheme) or scheme.replace("_", "\n") for scheme in schemes]
    columns = [Column("layer", "name"), Column("float32\n(kB)"), Column("int8\n(kB)"), *map(Column, shown)]
    table = make_table("Activation memory while it runs", columns, caption=_CAPTION)
    for name, offers in inspection.candidates.items():
        dense = _both(inspection.memory, name)
        if dense is None or not any(isinstance(offer, Candidate) for offer in offers.values()):
            continue
        cells = [
            _ratio(inspection.memory_with[scheme].module_peak_bytes(name, Precision.FLOAT32), dense[0])
            if isinstance(offers.get(scheme), Candidate)
            else NONE
            for scheme in schemes
        ]
        add_row(table, name, *map(kilo, dense), *cells)
    whole = inspection.memory.memory
    peaks = [_ratio(profile.memory.float32_bytes, whole.float32_bytes) for profile in inspection.memory_with.values()]
    add_totals(table, "whole network", kilo(whole.float32_bytes), kilo(whole.int8_bytes), *peaks)
    return table


_CAPTION = (
    "Analytic: inputs, outputs and all else alive, one image, no scratch memory of kernels. Schemes as a ratio to the "
    "layer as it is, in float32; above 1.00x the separable form needs more."
)


def memory_data(inspection: Inspection) -> dict[str, object]:
    """The same numbers, in bytes and both precisions, for JSON."""
    profiles = {"original": inspection.memory, **inspection.memory_with}
    return {
        role: {
            "peak_float32_bytes": profile.memory.float32_bytes,
            "peak_int8_bytes": profile.memory.int8_bytes,
            "layers": {
                name: {"float32_bytes": both[0], "int8_bytes": both[1]}
                for name in inspection.candidates
                if (both := _both(profile, name)) is not None
            },
        }
        for role, profile in profiles.items()
    }


def _both(profile: MemoryProfile, name: str) -> tuple[int, int] | None:
    """Bytes in float32 and int8 while a layer runs; None if it does not."""
    float32 = profile.module_peak_bytes(name, Precision.FLOAT32)
    int8 = profile.module_peak_bytes(name, Precision.INT8)
    return None if float32 is None or int8 is None else (float32, int8)


def _ratio(after: int | None, before: int) -> str:
    return NONE if after is None or not before else times_text(after / before)
