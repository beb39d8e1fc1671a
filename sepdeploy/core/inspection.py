"""What `sepdeploy inspect` finds out about a network."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from sepdeploy.core.conv import Trace
from sepdeploy.core.memory import MemoryProfile
from sepdeploy.core.plan import Candidate, Kept

__all__ = ["Inspection"]


@dataclass(frozen=True, slots=True)
class Inspection:
    """A network, and what each scheme could make of it.

    Attributes:
        trace: Its convolutions.
        candidates: Convolution -> scheme -> candidate or why not.
        memory: Activation memory of the network as it is.
        memory_with: Scheme -> activation memory with all its candidates in place; schemes without any are left out.
        notes: What the user should know.
    """

    trace: Trace
    candidates: Mapping[str, Mapping[str, Candidate | Kept]]
    memory: MemoryProfile
    memory_with: Mapping[str, MemoryProfile]
    notes: tuple[str, ...]
