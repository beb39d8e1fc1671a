"""What int8 files compute in int8, what they leave in float, and where they lose precision."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sepdeploy.core.int8_proof import FloatLayer, Int8Proof, LayerSqnr
from sepdeploy.core.report import ArtifactResult, Report
from sepdeploy.render.format_numbers import count_text, plural, printable
from sepdeploy.render.tables import NONE, Column, add_row, make_table

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["float_layer_text", "int8_caption", "int8_results", "int8_table", "share_text", "sqnr_text"]

_SHOWN = 3
"""Layers in the terminal; the page and the JSON report have all."""


def int8_results(report: Report) -> tuple[ArtifactResult, ...]:
    """The files that were looked into, in the order of the report."""
    return tuple(result for result in report.artifacts if result.int8 is not None)


def int8_table(report: Report) -> Table:
    """Each int8 file with its share of MACs in int8, what is in float and why, and the layers that add most noise."""
    results = int8_results(report)
    columns = [
        Column("file", "name"),
        Column("MACs in\nint8 (%)"),
        Column("computed in float", "name"),
        Column("layers that lose most SQNR", "name"),
    ]
    table = make_table("int8", columns, caption=int8_caption(report))
    for result in results:
        proof = result.int8
        if proof is not None:
            weakest = [f"{layer.name} {sqnr_text(layer)}" for layer in proof.weakest[:_SHOWN]]
            weakest += [proof.note] if proof.note else []
            floats = _float_texts(proof, result.float_ops)
            add_row(table, result.artifact.path, share_text(proof), _lines(floats), _lines(weakest))
    return table


def _float_texts(proof: Int8Proof, float_ops: Sequence[str]) -> list[str]:
    shown = [float_layer_text(layer) for layer in proof.float_layers[:_SHOWN]]
    more = len(proof.float_layers) - len(shown)
    if more:
        shown.append(f"and {plural(more, 'other layer')}")
    listed = {layer.operator for layer in proof.float_layers}
    without_macs = [text for text in float_ops if text.partition(" ")[0] not in listed]
    if without_macs:
        shown.append(f"without MACs: {', '.join(without_macs)}")
    return shown


def _lines(texts: Sequence[str]) -> str:
    return "\n".join(printable(text) for text in texts) or NONE


def share_text(proof: Int8Proof) -> str:
    """The share in percent, rounded down: 100.00 is all; unknown where it could not be found out."""
    if proof.note and not proof.macs:
        return NONE
    return f"{math.floor(10_000 * proof.ratio) / 100:.2f}"


def float_layer_text(layer: FloatLayer) -> str:
    """Such as 'head.up (ConvTranspose, 0.52 M MACs): the runtime has no int8 kernel for it'."""
    return f"{layer.name} ({layer.operator}, {count_text(layer.macs)} MACs): {layer.reason.value}"


def sqnr_text(layer: LayerSqnr) -> str:
    """Before and behind the layer, such as '38.1 to 31.5 dB'.

    >>> sqnr_text(LayerSqnr("stem", "Conv", None, 31.46))
    'exact to 31.5 dB'
    """
    before, after = ("exact" if db is None else f"{db:.1f}" for db in (layer.input_sqnr_db, layer.sqnr_db))
    return f"{before} to {after}{'' if layer.sqnr_db is None else ' dB'}"


def int8_caption(report: Report) -> str:
    """Where the numbers come from."""
    proofs = [result.int8 for result in report.artifacts if result.int8 is not None and result.int8.images]
    if not proofs:
        return ""
    images = plural(proofs[0].images, "calibration image")
    held_out = "that no range comes from" if proofs[0].is_held_out else "that the ranges come from as well"
    return (
        "MACs of convolutions and matrix products by the file's own shapes; in int8 are those that onnxruntime's "
        "optimized graph, or the types of the TFLite tensors, compute on 8-bit integers. SQNR before and behind a "
        f"layer, against the float file, on {images} {held_out}."
    )
