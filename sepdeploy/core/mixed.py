"""Which layers of an int8 file stay in float, or have int8 weights only, and why."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

__all__ = ["Arithmetic", "MixReason", "MixedLayer", "MixedPlan", "is_within"]


class Arithmetic(Enum):
    """How a layer of an int8 file computes; the value is what the user reads."""

    INT8 = "int8"
    WEIGHTS_ONLY = "int8 weights, float32 arithmetic"
    FLOAT32 = "float32"


class MixReason(Enum):
    """Why a layer does not compute in int8; the value is the sentence that the user reads."""

    FASTER = "it is cheaper so than in int8 on the target"
    ACCURACY = "in int8 it costs more accuracy than --max-drop allows"


@dataclass(frozen=True, slots=True)
class MixedLayer:
    """One layer that could compute otherwise than in int8, with what that was measured to change.

    Attributes:
        name: The layer of the network; all that it was replaced by goes along.
        arithmetic: What was chosen.
        reason: Why, None where it is int8.
        difference: Change of the cost of the layer's block against int8, conversions around it included, of what was
            chosen, or of float32 where that is int8; None where it could not be measured.
        difference_low: Lower end of its 95% interval where time was measured, else of its modelled range.
        difference_high: Upper end.
        sqnr_gain_db: By how much the file's outputs come nearer to the float file's with this layer alone so; None
            where that was not needed.
    """

    name: str
    arithmetic: Arithmetic
    reason: MixReason | None
    difference: float | None
    difference_low: float | None
    difference_high: float | None
    sqnr_gain_db: float | None


@dataclass(frozen=True, slots=True)
class MixedPlan:
    """What `--mixed auto` came to for the target's int8 file.

    Attributes:
        layers: All layers that were weighed, in the order of the network.
        unit: Of the differences.
        drop_points: What the file loses with all layers in int8.
        mixed_drop_points: What it loses as chosen; None where nothing was limited or changed.
        notes: What the user should know.
        unpriced: Layer -> arithmetic -> why it has no price.
    """

    layers: tuple[MixedLayer, ...]
    unit: str
    drop_points: float | None = None
    mixed_drop_points: float | None = None
    notes: tuple[str, ...] = ()
    unpriced: dict[str, dict[Arithmetic, str]] = field(default_factory=dict)

    @property
    def kept(self) -> dict[str, Arithmetic]:
        """Layer -> how it computes, of those that do not compute in int8."""
        return {layer.name: layer.arithmetic for layer in self.layers if layer.arithmetic is not Arithmetic.INT8}


def is_within(layer: str, name: str) -> bool:
    """Whether a layer of a file belongs to the layer `name` of the network, or is it; everything belongs to ''.

    >>> is_within("features.1.terms.0.1", "features.1"), is_within("features.10", "features.1")
    (True, False)
    """
    return not name or f"{layer}.".startswith(f"{name}.")
