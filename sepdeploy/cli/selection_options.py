"""What `--scheme auto` makes small and within which limits, as options of every command that selects."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import click

from sepdeploy.cli.parameters import Bytes
from sepdeploy.core.options import DEFAULT_MAX_DROP

__all__ = ["selection_options"]

_T = TypeVar("_T", bound=Callable[..., Any])

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


def selection_options(command: _T) -> _T:
    """Give a command the options of the selection; it takes `selection`, the fields of `SelectionOptions`."""

    @functools.wraps(command)
    def collecting(
        objective: str,
        max_latency: float | None,
        max_ratio: float | None,
        max_size: int | None,
        max_memory: int | None,
        pricing_time: float | None,
        **arguments: Any,
    ) -> Any:
        selection = {
            "goal": objective,
            "max_latency": max_latency,
            "max_latency_ratio": max_ratio,
            "max_size_bytes": max_size,
            "max_memory_bytes": max_memory,
            "pricing_seconds": pricing_time,
        }
        return command(selection=selection, **arguments)

    decorated: Any = collecting
    for option in reversed(_OPTIONS):
        decorated = option(decorated)
    return decorated  # type: ignore[no-any-return]
