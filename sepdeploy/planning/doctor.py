"""Finds out what each target needs on this machine: `sepdeploy doctor`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from importlib.metadata import PackageNotFoundError, version
from types import MappingProxyType

from sepdeploy.core.readiness import Need, Readiness
from sepdeploy.errors import UsageError
from sepdeploy.planning.target import TARGETS_BY_NAME, TargetKind

__all__ = ["DEFAULT_TARGETS", "DOCTORS", "Doctor", "examine"]

DEFAULT_TARGETS = ("ort", "litert")
"""Targets that `convert` makes and times files for unless told otherwise: what `doctor` is judged by."""

_CORES = "cortex-*"
_CONTAINERS = "docker*"

Doctor = Callable[[str], Readiness]
"""From the name of a target, as on the command line, to what it needs."""


def _local(name: str) -> Readiness:
    kind = TARGETS_BY_NAME[name]()
    return Readiness(name, kind.summary, _modules(kind))


def _modules(kind: TargetKind) -> tuple[Need, ...]:
    return tuple(
        Need(module, problem=f"the Python package with {module} is not installed", fix=kind.install)
        if module in kind.missing_modules
        else Need(module, found=_version(module))
        for module in kind.modules
    )


def _version(module: str) -> str:
    try:
        return version(module.replace("_", "-"))
    except PackageNotFoundError:  # built from source or a nightly: importable under another package name
        return "of unknown version"


def _emulated(name: str) -> Readiness:
    from sepdeploy.bench.arm_needs import arm_needs

    if name == _CORES:
        return Readiness(name, "Arm cores: instructions counted under emulation", arm_needs())
    if name not in TARGETS_BY_NAME:
        raise UsageError(f"there is no target '{name}'; choose one of {', '.join(TARGETS_BY_NAME)}")
    kind = TARGETS_BY_NAME[name]()
    return Readiness(name, kind.summary, (*_modules(kind), *arm_needs()))


def _docker(name: str) -> Readiness:
    from sepdeploy.bench.arm_needs import model_needs
    from sepdeploy.bench.docker_engine import docker_needs
    from sepdeploy.bench.docker_guest import core_of_target

    is_timed = name != _CONTAINERS and core_of_target(name) is None
    if is_timed:
        return Readiness(name, "the processor of an Arm host, in Docker", docker_needs())
    return Readiness(name, "the same cores, emulated in Docker", (*docker_needs(), *model_needs()))


def _ssh(name: str) -> Readiness:
    from sepdeploy.bench.board_ssh import ssh_needs

    return Readiness(name, "a board that ssh reaches: timed there", ssh_needs(name))


def _adb(name: str) -> Readiness:
    from sepdeploy.bench.board_adb import adb_needs

    return Readiness(name, "an Android device: LiteRT's benchmark_model is timed there", adb_needs(name))


DOCTORS: Mapping[str, Doctor] = MappingProxyType(
    {
        "ort": _local,
        "litert": _local,
        _CORES: _emulated,
        _CONTAINERS: _docker,
        "ssh://*": _ssh,
        "adb*": _adb,
    }
)
"""Pattern of target names -> what finds out about them."""


def examine(name: str) -> Readiness:
    """What the target needs, and whether it is there.

    Boards are asked only if `name` is that of one, not the pattern.

    Args:
        name: A target as on the command line, or a pattern of `DOCTORS`.

    Raises:
        UsageError: if there is no such target.
    """
    for pattern, doctor in DOCTORS.items():
        if name == pattern or fnmatchcase(name, pattern):
            return doctor(name)
    raise UsageError(f"there is no target '{name}'; choose from {', '.join(DOCTORS)}")
