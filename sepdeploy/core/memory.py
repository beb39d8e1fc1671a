"""What tracing finds about memory: the bytes of activations that are alive while each operator runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from sepdeploy.core.artifact import Precision

__all__ = ["BYTES_PER_VALUE", "ActivationMemory", "MemoryProfile", "MemoryStep"]

BYTES_PER_VALUE: Mapping[Precision, int] = MappingProxyType({Precision.FLOAT32: 4, Precision.INT8: 1})
"""Bytes of one activation value; a network's int8 form has the same graph as its float32 form."""


@dataclass(frozen=True, slots=True)
class MemoryStep:
    """One operator of a forward pass on one image, and what is alive while it runs: its inputs, outputs and all else.

    Attributes:
        module: Qualified name of the innermost module that runs it; '' for the network itself.
        operator: PyTorch's name of the operator; 'pad' for zeros that the runtime cannot leave to the convolution or
            the pooling after it, 'input' for the step before the first operator.
        live_values: Activation values alive, whose size depends on the precision.
        live_other_bytes: Bytes of indices, masks and the like, the same in every precision.
    """

    module: str
    operator: str
    live_values: int
    live_other_bytes: int = 0

    def live_bytes(self, precision: Precision) -> int:
        """Bytes of activations alive."""
        return self.live_values * BYTES_PER_VALUE[precision] + self.live_other_bytes


@dataclass(frozen=True, slots=True)
class ActivationMemory:
    """Most bytes of activations alive at once while a network runs on one image.

    Attributes:
        float32_bytes: In float32.
        int8_bytes: In int8.
    """

    float32_bytes: int
    int8_bytes: int

    def in_precision(self, precision: Precision) -> int:
        """Bytes in one of the two."""
        return self.float32_bytes if precision is Precision.FLOAT32 else self.int8_bytes


@dataclass(frozen=True, slots=True)
class MemoryProfile:
    """The activation memory of a network over one forward pass on one image.

    Attributes:
        steps: Operators in the order in which they run; at least the 'input' step.
    """

    steps: tuple[MemoryStep, ...]

    def peak(self, precision: Precision) -> MemoryStep:
        """The first step at which the most bytes are alive."""
        return max(self.steps, key=lambda step: step.live_bytes(precision))

    @property
    def memory(self) -> ActivationMemory:
        """Peaks in both precisions."""
        return ActivationMemory(self.peak_bytes(Precision.FLOAT32), self.peak_bytes(Precision.INT8))

    def peak_bytes(self, precision: Precision) -> int:
        """Bytes of activations that the network needs.

        >>> steps = (MemoryStep("", "input", 12), MemoryStep("conv", "convolution", 28))
        >>> MemoryProfile(steps).peak_bytes(Precision.FLOAT32)
        112
        """
        return self.peak(precision).live_bytes(precision)

    def module_peak_bytes(self, name: str, precision: Precision) -> int | None:
        """Bytes alive at the worst step inside a module, all its calls and submodules counted.

        For a convolution and for the chain in its place these two numbers compare: what is alive around them, such as
        a residual, is in both.

        Args:
            name: Qualified name of the module, such as `ConvSite.name`.
            precision: Of the activations.

        Returns:
            None if the module runs no operator: it is never called, or its name is that of a functional call.
        """
        inside = (step for step in self.steps if f"{step.module}.".startswith(f"{name}."))
        return max((step.live_bytes(precision) for step in inside), default=None)
