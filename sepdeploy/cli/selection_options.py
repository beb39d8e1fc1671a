"""What `--scheme auto` makes small and within which limits, as options of every command that selects."""

from __future__ import annotations

import click

from sepdeploy.cli.collect import collected
from sepdeploy.cli.parameters import Bytes
from sepdeploy.core.options import DEFAULT_MAX_DROP

__all__ = ["selection_options"]

_ABOVE_0 = click.FloatRange(min=0, min_open=True)

_OPTIONS = (
    click.option("--objective", type=click.Choice(("latency", "macs", "params")), default="latency", show_default=True,
                 help="What --scheme auto makes small within --max-drop "
                 f"({DEFAULT_MAX_DROP:g} point if nothing is limited)."),
    click.option("--max-latency", type=_ABOVE_0, metavar="N", help="Longest inference on the target, in its unit: "
                 "ms, or modelled kilocycles of an emulated core; within this and the next three limits as little "
                 "accuracy as possible is given up."),
    click.option("--max-ratio", type=click.FloatRange(0, 1, min_open=True), metavar="R", help="The same as a share of "
                 "the original's latency: 0.5 for twice the speed."),
    click.option("--max-size", type=Bytes(), metavar="BYTES", help="Largest weights in the target's precision: 300kB, "
                 "2MB."),
    click.option("--max-memory", type=Bytes(), metavar="BYTES", help="Highest peak of activations in the target's "
                 "precision: 256KiB."),
    click.option("--pricing-time", type=_ABOVE_0, metavar="SECONDS", help="Most time to measure blocks on the target; "
                 "what is not measured by then is not chosen. Measurements are kept for later runs."),
)  # fmt: skip


_FIELDS = {
    "objective": "goal",
    "max_latency": "max_latency",
    "max_ratio": "max_latency_ratio",
    "max_size": "max_size_bytes",
    "max_memory": "max_memory_bytes",
    "pricing_time": "pricing_seconds",
}

selection_options = collected(_OPTIONS, "selection", _FIELDS)
"""Gives a command the options of the selection; it takes `selection`, the fields of `SelectionOptions`."""
