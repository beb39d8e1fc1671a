"""Which stage is to blame for a file that loses more than --max-drop, and what would help."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType

from sepdeploy.core.artifact import Precision
from sepdeploy.core.options import ConvertOptions
from sepdeploy.core.report import Drops, Fault

__all__ = ["QUANTIZATION_ADVICE", "find_faults", "is_beyond_transfer"]

_ENOUGH_IMAGES = 256

QUANTIZATION_ADVICE: Mapping[str, Callable[[ConvertOptions], bool]] = MappingProxyType(
    {
        "--calibration-method auto": lambda options: options.int8.calibration_method == "auto",
        "--adaptive-rounding": lambda options: options.int8.rounds_adaptively,
        "--mixed auto": lambda options: options.mixed == "auto",
        "--qat": lambda options: options.training.is_quantization_aware,
    }
)
"""What helps, what costs least first -> whether it was done already."""


def find_faults(options: ConvertOptions, drops: Drops, images: int, *, is_hooked: bool = False) -> tuple[Fault, ...]:
    """The stages without which the limit would have held, the costlier first; none if it holds.

    The float network against the original is what the transfer and all that follows it lost; the file against that
    network is what quantization lost.

    Args:
        options: How it was converted; what they ask for already is not advised.
        drops: What was lost where.
        images: Calibration images that there were.
        is_hooked: Whether the user's own training took the place of sepdeploy's.
    """
    limit = options.max_drop_points
    if limit is None or drops.file <= limit:
        return ()
    faults = []
    if drops.network > limit or options.precision is not Precision.INT8:  # a float file differs by some few images
        points = drops.network if drops.network > limit else drops.file
        faults.append(Fault("transfer", points, tuple(_transfer_advice(options, images, is_hooked=is_hooked))))
    if options.precision is Precision.INT8 and (drops.network <= limit or drops.quantization > limit):
        advice = tuple(_quantization_advice(options, images, is_hooked=is_hooked))
        faults.append(Fault("quantization", drops.quantization, advice))
    return tuple(sorted(faults, key=lambda fault: -fault.points))


def is_beyond_transfer(limit: float, drops: Drops) -> bool:
    """Whether quantization alone breaks the limit, of the original network too: replacing less would not help."""
    return (
        drops.network <= limit < drops.file
        and drops.quantization > limit
        and drops.original_file is not None
        and drops.original_file > limit
    )


def _transfer_advice(options: ConvertOptions, images: int, *, is_hooked: bool) -> Iterator[str]:
    if is_hooked:
        yield "a longer training in the hook"
    else:
        yield "--train with training images" if options.train is None else "more --epochs"
    if not options.reconstructs:
        yield "--reconstruct" if options.transfer == "anchored" else "--transfer anchored"
    if not options.selects and options.plan is None:
        yield "--scheme auto"
    if images < _ENOUGH_IMAGES:
        yield f"more calibration images (there were {images})"


def _quantization_advice(options: ConvertOptions, images: int, *, is_hooked: bool) -> Iterator[str]:
    for advice, is_done in QUANTIZATION_ADVICE.items():
        if advice == "--qat" and is_hooked:
            continue  # a part of the training whose place the hook took
        if not is_done(options):
            yield f"{advice} with --train" if advice == "--qat" and options.train is None else advice
    if images < _ENOUGH_IMAGES:
        yield f"more calibration images (there were {images})"
    yield "--precision float32"
