"""Plans between the original network and the fastest one, side by side."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["FrontPoint"]


@dataclass(frozen=True, slots=True)
class FrontPoint:
    """One plan, as far as it is known; the original network is one too.

    Attributes:
        name: For the user: 'original', '14 of 19 replaced'.
        latency: Of the whole network on the target, in `unit`.
        unit: 'ms' or 'kcycles'.
        speedup: The original's latency / this one.
        damage: Change of the network's outputs; summed over the layers where it is predicted.
        accuracy_ratio: Share of the validation images that are right; None if not measured or without labels.
        drop_points: What `--max-drop` limits (`Quality.drop_points`); None if not measured.
        size_bytes: Of the target's file, or of the weights in its precision; None if not known.
        macs: Multiply-accumulates for one image; None if not known.
        is_predicted: Whether `latency`, `speedup` and `damage` are sums over the layers, not measured on the whole.
        is_chosen: Whether it is the plan that was taken.
        is_original: Whether it is the network as it came.
    """

    name: str
    latency: float
    unit: str
    speedup: float
    damage: float
    accuracy_ratio: float | None = None
    drop_points: float | None = None
    size_bytes: int | None = None
    macs: int | None = None
    is_predicted: bool = True
    is_chosen: bool = False
    is_original: bool = False
