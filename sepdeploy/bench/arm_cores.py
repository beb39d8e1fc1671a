"""The Arm cores that are emulated: what QEMU and llvm-mca call them, their caches, and what a miss is taken to cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from sepdeploy.errors import UsageError

__all__ = ["ARM_CORES", "ArmCore", "Cache", "find_core"]


@dataclass(frozen=True, slots=True)
class Cache:
    """A data cache with lines of 64 bytes.

    Attributes:
        kib: Size.
        ways: Associativity.
        miss_cycles: Cycles that a miss is taken to cost more than a hit, at the clock of the core.
    """

    kib: int
    ways: int
    miss_cycles: int


@dataclass(frozen=True, slots=True)
class ArmCore:
    """One kind of core, as it is in a board that many people have.

    Attributes:
        name: On the command line; also the name of its file in docker/arm64/cpuinfo.
        title: As Arm writes it.
        board: Where the clock and the caches are from.
        clock_ghz: Of the core in that board.
        qemu_cpu: `-cpu` of qemu-aarch64 7.2. It has no Cortex-A55; the Cortex-A76 has the same instructions, and runtimes
            choose kernels by /proc/cpuinfo.
        mca_cpu: `-mcpu` of llvm-mca. Its model of the Cortex-A53 misprices chains of multiply-adds, so that of the
            Cortex-A55 stands in; that of the Neoverse N1 is the Cortex-A76's.
        l1: First level.
        l2: Second level.
    """

    name: str
    title: str
    board: str
    clock_ghz: float
    qemu_cpu: str
    mca_cpu: str
    l1: Cache
    l2: Cache


_CORES = (
    ArmCore(
        "cortex-a53", "Cortex-A53", "Raspberry Pi 3B+", 1.4, "cortex-a53", "cortex-a55", Cache(32, 4, 13), Cache(512, 16, 150)
    ),
    # Its cores have no second level of their own: the shared one is meant.
    ArmCore(
        "cortex-a55", "Cortex-A55", "Rockchip RK3568", 2.0, "cortex-a76", "cortex-a55", Cache(32, 4, 25), Cache(512, 16, 240)
    ),
    ArmCore(
        "cortex-a72", "Cortex-A72", "Raspberry Pi 4", 1.5, "cortex-a72", "cortex-a72", Cache(32, 2, 17), Cache(1024, 16, 190)
    ),
    ArmCore(
        "cortex-a76", "Cortex-A76", "Raspberry Pi 5", 2.4, "cortex-a76", "neoverse-n1", Cache(64, 4, 9), Cache(512, 8, 260)
    ),
)  # fmt: skip

ARM_CORES: Mapping[str, ArmCore] = MappingProxyType({core.name: core for core in _CORES})


def find_core(name: str) -> ArmCore:
    """The core called `name`.

    Raises:
        UsageError: if there is none.

    >>> find_core("cortex-a72").title
    'Cortex-A72'
    """
    if name not in ARM_CORES:
        raise UsageError(f"there is no Arm core '{name}'; choose one of {', '.join(ARM_CORES)}")
    return ARM_CORES[name]
