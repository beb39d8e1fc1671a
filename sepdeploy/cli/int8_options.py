"""How int8 files are quantized, as options of every command that makes some."""

from __future__ import annotations

from typing import get_args

import click

from sepdeploy.cli.collect import collected
from sepdeploy.core.int8 import CalibrationMethod, Int8Options, IoType

__all__ = ["int8_options"]

_DEFAULTS = Int8Options()

_OPTIONS = (
    click.option("--calibration-method", type=click.Choice(get_args(CalibrationMethod)), show_default=True,
                 default=_DEFAULTS.calibration_method, help="How ranges of int8 activations follow from the "
                 "calibration images; auto takes the highest SQNR of the whole network on images held out."),
    click.option("--io", type=click.Choice(get_args(IoType)), default=_DEFAULTS.io, show_default=True, help="What int8 "
                 "files take and return; auto is int8 in TFLite and float32 in ONNX."),
    click.option("--equalize/--no-equalize", default=_DEFAULTS.equalizes, show_default=True, help="Rescale channels "
                 "between layers before quantizing, which changes nothing in float, if int8 gains by it."),
    click.option("--bias-correction/--no-bias-correction", default=_DEFAULTS.corrects_bias, show_default=True,
                 help="Take the mean error of rounded weights back through the biases, if int8 gains by it."),
    click.option("--adaptive-rounding/--no-adaptive-rounding", default=_DEFAULTS.rounds_adaptively, show_default=True,
                 help="Round each weight to the side that keeps the outputs (AdaRound), if int8 gains by it; takes "
                 "minutes."),
)  # fmt: skip


_FIELDS = {
    "calibration_method": "calibration_method",
    "io": "io",
    "equalize": "equalizes",
    "bias_correction": "corrects_bias",
    "adaptive_rounding": "rounds_adaptively",
}

int8_options = collected(_OPTIONS, "int8", _FIELDS)
"""Gives a command the options of int8; it takes `int8`, the fields of `Int8Options`."""
