"""The Arm cores that are emulated: what QEMU and llvm-mca call them, their caches, and what a miss is taken to cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from sepdeploy.errors import UsageError

__all__ = ["ARM_CORES", "ArmCore", "Cache", "emulated_core", "find_core"]


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
        qemu_cpu: `-cpu` of qemu-aarch64 7.2. It has no Cortex-A55; the Cortex-A76 has the same instructions, and
            runtimes choose kernels by /proc/cpuinfo.
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
        name="cortex-a53",
        title="Cortex-A53",
        board="Raspberry Pi 3B+",
        clock_ghz=1.4,
        qemu_cpu="cortex-a53",
        mca_cpu="cortex-a55",
        l1=Cache(32, 4, 13),
        l2=Cache(512, 16, 150),
    ),
    ArmCore(
        name="cortex-a55",
        title="Cortex-A55",
        board="Rockchip RK3568",
        clock_ghz=2.0,
        qemu_cpu="cortex-a76",
        mca_cpu="cortex-a55",
        l1=Cache(32, 4, 25),
        l2=Cache(512, 16, 240),  # shared: its cores have no second level of their own
    ),
    ArmCore(
        name="cortex-a72",
        title="Cortex-A72",
        board="Raspberry Pi 4",
        clock_ghz=1.5,
        qemu_cpu="cortex-a72",
        mca_cpu="cortex-a72",
        l1=Cache(32, 2, 17),
        l2=Cache(1024, 16, 190),
    ),
    ArmCore(
        name="cortex-a76",
        title="Cortex-A76",
        board="Raspberry Pi 5",
        clock_ghz=2.4,
        qemu_cpu="cortex-a76",
        mca_cpu="neoverse-n1",
        l1=Cache(64, 4, 9),
        l2=Cache(512, 8, 260),
    ),
)
"""Sizes are the chips'. What misses cost is assumed, about 110 ns for memory: it makes the high estimate, no more."""

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


def emulated_core(target: str | None) -> ArmCore | None:
    """The core that a target emulates on this machine; None for other targets.

    >>> emulated_core("cortex-a72:ort").name, emulated_core("ort")
    ('cortex-a72', None)
    """
    return ARM_CORES.get((target or "").removesuffix(":ort"))
