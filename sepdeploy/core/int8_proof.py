"""How much of an int8 file computes in int8, and where it loses precision."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from sepdeploy.errors import ContractError

__all__ = ["FloatLayer", "FloatReason", "Int8Proof", "LayerSqnr"]


class FloatReason(Enum):
    """Why an operator of an int8 file computes in floating point; the value is the sentence that the user reads."""

    NO_KERNEL = "the runtime has no int8 kernel for it"
    INPUT = "its input is not in int8"
    WEIGHTS = "its weights are not in int8"
    WEIGHTS_ONLY = "only its weights are in int8"
    OUTPUT = "its output is not in int8"
    MIXED_FASTER = "--mixed auto: it is cheaper so than in int8 on the target"
    MIXED_ACCURACY = "--mixed auto: in int8 it costs more accuracy than --max-drop allows"
    NOT_FUSED = "the runtime does not take it together with the conversions around it on this processor"


@dataclass(frozen=True, slots=True)
class FloatLayer:
    """An operator with multiply-accumulates that an int8 file computes in floating point.

    Attributes:
        name: The layer, as the network calls it where the file says so.
        operator: The runtime's name of the operator: 'ConvTranspose', 'TRANSPOSE_CONV'.
        macs: Multiply-accumulates for one image.
        reason: Why.
    """

    name: str
    operator: str
    macs: int
    reason: FloatReason


@dataclass(frozen=True, slots=True)
class LayerSqnr:
    """How far one layer of the int8 file is from the same layer of the float file, errors of earlier layers included.

    Attributes:
        name: The layer.
        operator: The runtime's name of the operator.
        input_sqnr_db: 10 log10(sum y^2 / sum (y - y')^2) of what it reads, float y against int8 y'; of several inputs
            the least. None where it is infinite: nothing was lost.
        sqnr_db: The same of what it returns, behind its activation.
    """

    name: str
    operator: str
    input_sqnr_db: float | None
    sqnr_db: float | None

    @property
    def added_noise_ratio(self) -> float:
        """By how much noise / signal grows from the layer's input to its output; below 0 where it averages noise out.

        >>> LayerSqnr("conv", "Conv", None, 20.0).added_noise_ratio
        0.01
        """
        before, after = (0.0 if db is None else 10 ** (-db / 10) for db in (self.input_sqnr_db, self.sqnr_db))
        return after - before


@dataclass(frozen=True, slots=True)
class Int8Proof:
    """What an int8 file computes in int8, read from the file itself.

    Attributes:
        macs: Multiply-accumulates for one image of all convolutions and matrix products, from the file's shapes.
        int8_macs: Those of operators that the runtime computes in int8.
        float_layers: The others, the costliest first.
        layers: Signal-to-noise ratio at each convolution and matrix product, in the order of the file.
        images: Calibration images behind `layers`.
        is_held_out: Whether those had no part in the ranges.
        note: What could not be found out, and why; empty if nothing.

    Raises:
        ContractError: if the operators do not add up.
    """

    macs: int
    int8_macs: int
    float_layers: tuple[FloatLayer, ...]
    layers: tuple[LayerSqnr, ...] = ()
    images: int = 0
    is_held_out: bool = False
    note: str = ""

    def __post_init__(self) -> None:
        if self.int8_macs + sum(layer.macs for layer in self.float_layers) != self.macs:
            raise ContractError("the multiply-accumulates in int8 and in float do not add up to all of them")

    @property
    def ratio(self) -> float:
        """Share of the multiply-accumulates in int8, in [0, 1]; 1 if there are none."""
        return self.int8_macs / self.macs if self.macs else 1.0

    @property
    def weakest(self) -> tuple[LayerSqnr, ...]:
        """The layers that add noise, those that add most first."""
        adding = [layer for layer in self.layers if layer.added_noise_ratio > 0]
        return tuple(sorted(adding, key=lambda layer: -layer.added_noise_ratio))
